"""The model page: what it says is so, and is what the repository's README says."""

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


README = ROOT / "README.md"
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


def test_front_matter_for_the_released_weights_is_the_guides(folder):
    made = card.write_card(folder, "me/page", find_origin("jinaai/jina-vlm"), [])
    assert made.data.to_dict() == ModelCard.load(README).data.to_dict()
    assert "https://huggingface.co/jinaai/jina-vlm" in made.text and "`cc-by-nc-4.0`" in made.text
    assert "(https://creativecommons.org/licenses/by-nc/4.0/)" in made.text


@pytest.mark.parametrize("heading", ["Limits", "Text from strangers", "Citation"])
def test_page_and_guide_say_the_same(folder, heading):
    text = card.write_card(folder, "me/page", ORIGIN, []).text
    guide = README.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0].strip()
    assert len(guide) > 100 and f"\n## {heading}\n\n{guide}\n" in f"{text}\n"


def test_code_of_the_page_is_the_guides_first_example(folder):
    text = card.write_card(folder, "me/page", ORIGIN, []).text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    guides = code.replace("me/page", "checkpoints/tiny").replace("photo.png", "docs/shapes.png")
    assert code != guides and f"```python\n{guides}```" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("## Limits", "## Bounds", "no section 'Limits'"), ("docs/shapes.png", "docs/other.png", "lacks docs/shapes.png")],
)
def test_a_guide_that_went_its_own_way_is_an_error(folder, tmp_path, monkeypatch, old, new, message):
    changed = tmp_path / "README.md"
    changed.write_text(README.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    monkeypatch.setattr(card, "README", changed)
    with pytest.raises(PublishingError, match=message):
        card.write_card(folder, "me/page", ORIGIN, [])


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
        headings = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
        targets = re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        assert targets
        for target in targets:
            assert target.startswith("https://") or (folder / target).is_file() or target.removeprefix("#") in headings, target


# Results ---------------------------------------------------------------------------------------------------------------


def test_results_become_a_table_and_a_model_index(folder, tmp_path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"command": "make eval-something", "results": [RESULT]}))
    card.write_card(folder, "me/page", ORIGIN, [], results=results)
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
def test_results_that_cannot_be_read_are_an_error(folder, tmp_path, content):
    results = tmp_path / "results.json"
    if content is not None:
        results.write_text(content)
    with pytest.raises(PublishingError, match="--results .*results.json"):
        card.write_card(folder, "me/page", ORIGIN, [], results=results)


# Metadata --------------------------------------------------------------------------------------------------------------


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


# Licence and origin ----------------------------------------------------------------------------------------------------


def test_origin_of_the_small_checkpoint():
    origin = find_origin(str(TINY))
    assert (origin.license, origin.base_model, origin.languages) == ("apache-2.0", None, ["en", "de", "es", "fr"])
    assert "by this repository from nothing" in card.section(origin.about).replace("\n", " ")


def test_unknown_licence_or_origin_is_an_error(released_folder):
    with pytest.raises(PublishingError, match="licence of .* is not known.*--license"):
        find_origin(str(released_folder), origin="me/base")
    with pytest.raises(PublishingError, match="come from is not known.*--origin"):
        find_origin(str(released_folder), license="mit")
    origin = find_origin(str(released_folder), license="mit", origin="me/base")
    assert origin.base_model == "me/base" and origin.text.endswith("[me/base](https://huggingface.co/me/base)")
    origin = find_origin(str(released_folder), license="mit", origin="The weights are random.")
    assert (origin.base_model, origin.text) == (None, "The weights are random")


def test_licence_and_origin_of_the_checkpoints_own_card(tmp_path):
    front = "---\nlicense: cc-by-nc-4.0\nbase_model: jinaai/jina-vlm\nlanguage: en\n---\n"
    (tmp_path / "README.md").write_text(front)
    origin = find_origin(str(tmp_path))
    assert (origin.license, origin.base_model, origin.languages) == ("cc-by-nc-4.0", "jinaai/jina-vlm", ["en"])
    assert origin.text == "The weights derive from [jinaai/jina-vlm](https://huggingface.co/jinaai/jina-vlm)"
    assert find_origin("jinaai/jina-vlm").text.startswith("The weights come from ")
    for weights in (str(tmp_path), "jinaai/jina-vlm"):
        with pytest.raises(PublishingError, match="--license is apache-2.0, but .* says cc-by-nc-4.0"):
            find_origin(weights, license="apache-2.0")


def test_other_licences_need_a_name_and_a_link(tmp_path, folder):
    with pytest.raises(PublishingError, match="license_name and license_link"):
        find_origin(str(tmp_path), license="other", origin="me/base")
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: ours\nlicense_link: https://x.example\nbase_model: me/base\n---\n")
    made = card.write_card(folder, "me/page", find_origin(str(tmp_path)), [])
    assert made.data.license_name == "ours" and "`ours` ([text](https://x.example))" in made.text
