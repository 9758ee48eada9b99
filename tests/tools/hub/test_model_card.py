"""The model page: what it says is so."""

import ast
import json
import re
from pathlib import Path

import jina_vlm
import pytest
from conftest import ROOT
from huggingface_hub import EvalResult, ModelCard

from benchmarks.parameters import count
from jina_vlm_tools.files import TINY
from jina_vlm_tools.hub import PublishingError, card
from jina_vlm_tools.hub.assemble import assemble
from jina_vlm_tools.hub.origin import Origin, find_origin


ORIGIN = Origin(license="mit", text="The weights come from a test")
RESULT = {
    "task_type": "image-text-to-text",
    "dataset_type": "shapes",
    "dataset_name": "Shapes",
    "dataset_split": "unseen pairs",
    "metric_type": "accuracy",
    "metric_value": 12.5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    assemble(str(TINY), folder, max_shard_size="2MB")
    return folder


# What the Hub's page of jinaai/jina-vlm says in its front matter
RELEASE = {
    "library_name": "transformers",
    "pipeline_tag": "image-text-to-text",
    "license": "cc-by-nc-4.0",
    "base_model": "jinaai/jina-vlm",
    "tags": {"multimodal", "multilingual", "vlm", "vision-language", "qwen3", "siglip2"},
    "language": set("en zh ar pt ru tr de es fr it ja ko vi th id hi bn nl pl sv fi da no cs el he uk ro hu".split())
    | {"multilingual"},
}


def test_front_matter_for_the_released_weights_is_the_releases(folder):
    made = card.write_card(folder, "me/page", find_origin("jinaai/jina-vlm"), [])
    data = made.data.to_dict()
    for name, value in RELEASE.items():
        assert data[name] == value if isinstance(value, str) else set(data[name]) >= value, name
    assert len(data["language"]) == 30 and {"jina-vlm", "custom_code"} <= set(data["tags"])
    assert "https://huggingface.co/jinaai/jina-vlm" in made.text and "`cc-by-nc-4.0`" in made.text
    assert "(https://creativecommons.org/licenses/by-nc/4.0/)" in made.text


def test_front_matter_of_the_readme_is_the_releases():
    """But for the license: the repository holds code, and weights of its own."""
    data = ModelCard.load(ROOT / "README.md").data.to_dict()
    assert data.pop("license") == "apache-2.0"
    for name in RELEASE.keys() - {"license"}:
        assert data[name] == RELEASE[name] if isinstance(RELEASE[name], str) else set(data[name]) >= RELEASE[name], (
            name
        )
    card.check_card(ROOT / "README.md")


def test_page_says_which_code_the_release_needs_and_what_replaces_it(folder):
    replaced = "code for transformers 4.57, which does not load on transformers 5. The modules on this page replace it"
    derived = Origin(license="mit", text="The weights derive from it", base_model="jinaai/jina-vlm")
    for origin, says_so in ((find_origin("jinaai/jina-vlm"), True), (derived, True), (find_origin(str(TINY)), False)):
        text = " ".join(card.write_card(folder, "me/page", origin, []).text.split())
        assert (replaced in text) == says_so


@pytest.mark.parametrize("weights", [str(TINY), "jinaai/jina-vlm"])
def test_text_of_the_page_is_whole(folder, weights):
    """Nothing of the template is left in it, and no tag that other weights have."""
    made = card.write_card(folder, "me/page", find_origin(weights), [])
    assert not re.search(r"{%|{#|{{ |Undefined|None", made.text)
    headings = re.findall("^## (.*)$", made.text, re.MULTILINE)
    assert [heading for heading in headings if heading != "The small checkpoint"] == [
        "Usage", "Weights", "Intended use", "Limits", "Text from strangers", "License", "Citation",
    ]  # fmt: skip
    assert ("## The small checkpoint" in made.text) == ("siglip2" not in made.data.tags) == (weights == str(TINY))
    (code,) = re.findall(r"```python\n(.*?)```", made.text, re.DOTALL)
    ast.parse(code)
    assert 'checkpoint = "me/page"' in code
    assert "author        = {{Jina AI}}," in made.text


def test_numbers_of_the_page_are_those_of_the_folder(folder):
    text = card.write_card(folder, "me/page", ORIGIN, ["They were changed."], commit="abc123").text
    parts = count(jina_vlm.JinaVLMConfig.from_pretrained(folder))
    rows = dict(re.findall(r"^\| (.+?) \| ([\d,]+) \|$", text, re.MULTILINE))
    assert rows == {part: f"{number:,}" for part, number in parts.items()}
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    for file in [*shards, folder / "model.safetensors.index.json"]:
        assert f"`{file.name}` ({file.stat().st_size:,} bytes)" in text
    assert f"{sum(file.stat().st_size for file in folder.glob('model*.safetensors*')):,} bytes in all" in text
    assert "Stored as BF16:" in text and "378 x 378" in text and "4,096 tokens" in text
    assert "commit `abc123`. They were changed." in text


def test_links_of_the_page_lead_somewhere(folder):
    (folder / "CODE_LICENSE").touch()
    for origin in (find_origin(str(TINY)), find_origin("jinaai/jina-vlm")):
        text = card.write_card(folder, "me/page", origin, []).text
        headings = {
            re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        }
        targets = re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        assert targets
        for target in targets:
            assert (
                target.startswith("https://") or (folder / target).is_file() or target.removeprefix("#") in headings
            ), target


# Results -------------------------------------------------------------------------------------------------------------


def test_results_become_a_table_and_a_model_index(folder, tmp_path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"command": "make eval-something", "results": [RESULT]}))
    card.write_card(folder, "me/page", ORIGIN, [], results=card.read_results(results))
    read = ModelCard.load(folder / "README.md")
    assert read.data.model_name == "page" and [r.metric_value for r in read.data.eval_results] == [12.5]
    assert read.data.to_dict()["model-index"][0]["results"][0]["dataset"]["split"] == "unseen pairs"
    assert "By `make eval-something`:" in read.text and "| Shapes, unseen pairs | accuracy | 12.5 |" in read.text
    assert read.data.eval_results[0].is_equal_except_value(EvalResult(**RESULT))


def test_without_results_the_page_claims_none(folder):
    made = card.write_card(folder, "me/page", ORIGIN, [])
    assert "model-index" not in made.data.to_dict() and "Results" not in made.text


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        json.dumps({"results": [RESULT]}),
        json.dumps({"command": "x", "results": [{**RESULT, "metric_value": "high"}]}),
        json.dumps({"command": "x", "results": [{k: v for k, v in RESULT.items() if k != "metric_type"}]}),
        json.dumps([RESULT]),
        None,
    ],
)
def test_results_that_cannot_be_read_are_an_error(tmp_path, content):
    results = tmp_path / "results.json"
    if content is not None:
        results.write_text(content)
    with pytest.raises(PublishingError, match="--results .*results.json"):
        card.read_results(results)


# Metadata ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("license: mit", "license: My Licence", "`license` is 'My Licence'"),
        ("license: mit\n", "", "`license` is missing"),
        ("pipeline_tag: image-text-to-text\n", "", "`pipeline_tag` is missing"),
        ("license: mit", "license: mit\nlanguage:\n- English", "`language` holds 'English'"),
        ("license: mit", "license: mit\nbase_model: a b", "`base_model`"),
        ("license: mit", "license: [mit", "cannot be read"),
        ("license: mit", "license: mit\nmodel-index:\n- results: []", "cannot be read"),
        ("- jina-vlm", "- 7", "`tags` holds 7"),
    ],
)
def test_metadata_that_the_hub_would_not_take_are_an_error(folder, tmp_path, old, new, message):
    content = card.write_card(folder, "me/page", ORIGIN, []).content
    assert old in content
    (tmp_path / "README.md").write_text(content.replace(old, new, 1))
    with pytest.raises(PublishingError, match=re.escape(message)):
        card.check_card(tmp_path / "README.md")


# License and origin --------------------------------------------------------------------------------------------------


def test_origin_of_the_small_checkpoint():
    origin = find_origin(str(TINY))
    assert (origin.license, origin.base_model, origin.languages) == ("apache-2.0", None, ["en", "de", "es", "fr"])
    assert origin.is_tiny and origin.tags is None and "trained from nothing by the repository" in origin.text


def test_unknown_license_or_origin_is_an_error(released_folder):
    with pytest.raises(PublishingError, match="license of .* is not known.*--license"):
        find_origin(str(released_folder), origin="me/base")
    with pytest.raises(PublishingError, match="come from is not known.*--origin"):
        find_origin(str(released_folder), license="mit")
    origin = find_origin(str(released_folder), license="mit", origin="me/base")
    assert origin.base_model == "me/base" and origin.text.endswith("[me/base](https://huggingface.co/me/base)")
    origin = find_origin(str(released_folder), license="mit", origin="The weights are random.")
    assert (origin.base_model, origin.text) == (None, "The weights are random")


def test_license_and_origin_of_the_checkpoints_own_card(tmp_path):
    front = "---\nlicense: cc-by-nc-4.0\nbase_model: jinaai/jina-vlm\nlanguage: en\n---\n"
    (tmp_path / "README.md").write_text(front)
    origin = find_origin(str(tmp_path))
    assert (origin.license, origin.base_model, origin.languages) == ("cc-by-nc-4.0", "jinaai/jina-vlm", ["en"])
    assert origin.text == "The weights derive from [jinaai/jina-vlm](https://huggingface.co/jinaai/jina-vlm)"
    assert find_origin("jinaai/jina-vlm").text.startswith("The weights come from ")
    for weights in (str(tmp_path), "jinaai/jina-vlm"):
        with pytest.raises(PublishingError, match="--license is apache-2.0, but .* says cc-by-nc-4.0"):
            find_origin(weights, license="apache-2.0")


def test_other_licenses_need_a_name_and_a_link(tmp_path, folder):
    with pytest.raises(PublishingError, match="license_name and license_link"):
        find_origin(str(tmp_path), license="other", origin="me/base")
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: ours\nlicense_link: https://x.example\nbase_model: me/base\n---\n"
    )
    made = card.write_card(folder, "me/page", find_origin(str(tmp_path)), [])
    assert made.data.license_name == "ours" and "`ours` ([text](https://x.example))" in made.text
