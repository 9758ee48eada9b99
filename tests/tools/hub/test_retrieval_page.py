"""A retrieval folder becomes a page: which folder, which base, what is sent, what the card says. That what is
published embeds is tested by test_retrieval_runs.py, which needs sentence-transformers."""

import ast
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jina_vlm
import pytest
from conftest import ROOT
from huggingface_hub import HfApi, ModelCard
from miniature import save_miniature
from retrieval_folder import save_retrieval_folder
from safetensors.torch import load_file

from jina_vlm_tools.hub import PublishingError, retrieval
from jina_vlm_tools.hub.card import read_results
from jina_vlm_tools.hub.embedding import Base, embed, with_local_base
from jina_vlm_tools.hub.merged import list_merged
from jina_vlm_tools.hub.origin import Origin, find_origin
from jina_vlm_tools.hub.push import find_target, push
from jina_vlm_tools.hub.retrieval_card import write_card


pytest.importorskip("peft")
ORIGIN = Origin(license="cc-by-nc-4.0", text="", base_model="me/base", languages=["en", "de"])
CARD = "---\nlicense: cc-by-nc-4.0\nlanguage: [en, de]\n---\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base, and beside it retrieval folders of the decoder and of the connector, that name it as on the Hub."""
    home = tmp_path_factory.mktemp("home")
    (save_miniature(home / "base") / "README.md").write_text(CARD)
    save_retrieval_folder(home / "retrieval", home / "base", "me/base")
    save_retrieval_folder(home / "connected", home / "base", "me/base", ("connector", "decoder"))
    return home


@pytest.fixture(scope="module")
def page(home, tmp_path_factory) -> tuple[Path, retrieval.Facts]:
    folder = tmp_path_factory.mktemp("page")
    return folder, retrieval.assemble(home / "retrieval", folder, Base("me/base", home / "base"))


@pytest.fixture
def copy(home, tmp_path) -> Path:
    shutil.copytree(home, tmp_path / "home")
    return tmp_path / "home" / "retrieval"


def change(file: Path, **settings) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def refused(message: str):
    return pytest.raises(PublishingError, match=message)


# Which folder, which base --------------------------------------------------------------------------------------------


def test_wrong_folders_are_named(copy, tmp_path):
    retrieval.check_kind(copy)
    with refused("no such folder"):
        retrieval.check_kind(tmp_path / "nothing")
    with refused("no retrieval folder: it has no adapter_config.json"):
        retrieval.check_kind(tmp_path)
    with refused("a whole checkpoint. Publish it by --weights"):
        retrieval.check_kind(copy.parent / "base")
    shutil.copy(copy / "modules.json", copy.parent / "base")
    with refused("merged. Name the retrieval folder that it was made of"):
        retrieval.check_kind(copy.parent / "base")
    (copy / "modules.json").unlink()
    with refused("an adapter alone: it has no modules.json"):
        retrieval.check_kind(copy)


def test_a_base_is_an_id_of_the_hub(copy, monkeypatch):
    assert retrieval.name_base(copy, None) == "me/base"
    assert retrieval.name_base(copy, "you/base") == "you/base"
    monkeypatch.chdir(copy.parent.parent)
    for given in ("home/base", "../base", "base", str(copy.parent / "base")):
        with refused(f"--base {re.escape(given)}: expected the base's id on the Hub"):
            retrieval.name_base(copy, given)
    # a folder from here, one from where the adapter lies, gone ones, and none
    for name in ("home/base", str(copy.parent / "base"), "../base", "/gone/base", "base", "", None):
        change(copy / "adapter_config.json", base_model_name_or_path=name)
        with refused(f"names the base by {f'a folder, {re.escape(name)}' if name else 'nothing'}. Say by --base"):
            retrieval.name_base(copy, None)
        assert retrieval.name_base(copy, "me/base") == "me/base"
    monkeypatch.chdir("/")
    change(copy / "adapter_config.json", base_model_name_or_path="home/base")
    with refused("names the base by a folder, home/base"):  # its place from the working directory of the training
        retrieval.name_base(copy, None)


def test_files_of_the_base(copy, hub, released_folder):
    """Beside the adapter before anything is sent; the Hub's, which readers will load, for what is sent."""
    assert retrieval.find_files(copy, "me/base", from_hub=False) == Base("me/base", copy.parent / "base")
    with pytest.raises(Exception, match="Repository Not Found"):
        retrieval.find_files(copy, "me/base", from_hub=True)
    commit = hub.put("me/base", copy.parent / "base")
    found = retrieval.find_files(copy, "me/base", from_hub=True)
    assert (found.name, found.commit) == ("me/base", commit)
    assert (found.place / "config.json").read_bytes() == (copy.parent / "base" / "config.json").read_bytes()
    assert not (found.place / "README.md").exists()
    hub.put("me/released", released_folder)
    with refused("base me/released is in the released layout.*Publish it in this layout"):
        retrieval.find_files(copy, "me/released", from_hub=True)
    hub.create("me/empty")
    with refused("base me/empty holds no config.json"):
        retrieval.find_files(copy, "me/empty", from_hub=True)


# The page's files ----------------------------------------------------------------------------------------------------


def test_a_page_holds_what_belongs_to_it_and_this_version_s_code(home, page, tmp_path):
    source = shutil.copytree(home / "retrieval", tmp_path / "source")
    (source / "optimizer.pt").write_text("much")
    (source / "processing_jina_vlm.py").write_text("raise RuntimeError('old')")
    change(source / "adapter_config.json", base_model_name_or_path="../base", revision="v1")
    (tmp_path / "made").mkdir()
    retrieval.assemble(source, tmp_path / "made", Base("me/base", home / "base"))
    names = retrieval.list_files(tmp_path / "made", with_card=False)
    assert names == sorted(
        path.relative_to(page[0]).as_posix()
        for path in page[0].rglob("*")
        if path.is_file() and path.name != "README.md"
    )
    assert all((tmp_path / "made" / name).read_bytes() == (page[0] / name).read_bytes() for name in names)
    assert "optimizer.pt" not in names and "config.json" not in names and "1_Dense/model.safetensors" in names
    settings = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("me/base", None)
    for name in ("processing_jina_vlm.py", "tiling_jina_vlm.py"):
        assert (tmp_path / "made" / name).read_bytes() == (ROOT / name).read_bytes()
    weights, before = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "made", source))
    assert weights.keys() == before.keys() and all((weights[name] == before[name]).all() for name in weights)


def test_facts_of_a_page(home, page):
    facts = page[1]
    assert (facts.task, facts.parts, facts.rank, facts.width, facts.hidden) == ("retrieval", ("decoder",), 4, 16, 32)
    assert facts.parameters == sum(
        tensor.numel() for tensor in load_file(home / "retrieval" / "adapter_model.safetensors").values()
    )
    assert facts.dims == jina_vlm.JinaVLMConfig.from_pretrained(home / "base").matryoshka_dimensions
    assert facts.max_tiles == 4 and facts.prompts == {"query": "Query:", "document": "Passage:"}


def test_what_cannot_be_a_page_is_refused(copy, tmp_path):
    base = Base("me/base", copy.parent / "base")

    def assemble(folder: Path = copy, base: Base = base):
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        (tmp_path / "made").mkdir()
        return retrieval.assemble(folder, tmp_path / "made", base)

    assemble()
    settings = copy / "config_sentence_transformers.json"
    change(settings, model_type="SentenceTransformer")
    with refused("holds a MultiVectorEncoder.*projector would be random"):
        assemble()
    change(settings, model_type="MultiVectorEncoder")
    modules = json.loads((copy / "modules.json").read_text())
    for changed in ({"type": "custom_st.Transformer"}, {"path": "../1_Dense"}, {"path": ".."}):
        (copy / "modules.json").write_text(json.dumps([modules[0], modules[1] | changed, *modules[2:]]))
        with refused("Expected modules of sentence-transformers alone"):
            assemble()
    (copy / "modules.json").write_text(json.dumps(modules))
    (copy / "sentence_bert_config.json").unlink()
    with refused("lacks sentence_bert_config.json"):
        assemble()
    other = tmp_path / "other"
    shutil.copytree(copy.parent / "base", other)
    config = json.loads((other / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 64}
    config["matryoshka_dimensions"] = [64]
    (other / "config.json").write_text(json.dumps(config))
    shutil.copy(copy.parent / "connected" / "sentence_bert_config.json", copy)
    with pytest.raises(ValueError, match="is for a model of width 32, but that of .*other is 64"):
        assemble(base=Base("me/other", other))


def test_a_page_with_something_else_in_it_is_none(page, tmp_path):
    folder = shutil.copytree(page[0], tmp_path / "copy")
    (folder / "1_Dense" / "thesis.tex").touch()
    (folder / "runs").mkdir()
    (folder / "runs" / "log").touch()
    (folder / "README.md").touch()
    with refused("holds 1_Dense/thesis.tex, runs/log, which belongs to no page"):
        retrieval.list_files(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "README.md").unlink()
    with refused("lacks README.md, adapter_model.safetensors: it is no whole page"):
        retrieval.list_files(folder)
    with refused("is no merged folder"):
        list_merged(folder)


def test_a_page_with_its_base_here_is_the_page_but_for_the_name(page, home):
    with with_local_base(page[0], Base("me/base", home / "base")) as local:
        assert json.loads((local / "adapter_config.json").read_text())["base_model_name_or_path"] == str(home / "base")
        for path in page[0].rglob("*.*"):
            if path.name != "adapter_config.json":
                assert (local / path.relative_to(page[0])).read_bytes() == path.read_bytes()
    assert not local.exists()
    assert json.loads((page[0] / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"agreement": {"dense": 1.0, "multi": 0.98}}, r"vectors \(multi\) that differ.*0.9800"),
        ({"agreement": {"dense": float("nan"), "multi": 1.0}}, r"vectors \(dense\) that differ.*nan"),
        ({"changes": 0.0}, "an adapter that changes no vector"),
        ({"changes": float("nan")}, "an adapter that changes no vector"),
        ({"answers_as_before": False}, "another answer than the base's where the adapter is off"),
        ({"answer": ""}, "an empty answer of the base"),
        ({"unloaded": ["a.lora_A"]}, r"weights of the adapter that the base has no place for \(a.lora_A\)"),
        ({"faults": {"missing_keys": ["lm_head.weight"]}}, "missing_keys of the base: lm_head.weight"),
        ({"code": ["jina_vlm", "transformers_modules"]}, "code that neither it nor its base brought"),
    ],
)
def test_what_does_not_embed_as_it_should_is_refused(page, home, monkeypatch, said, message):
    good = {
        "agreement": {"dense": 1.0, "multi": 0.995}, "shapes": {}, "changes": 0.1, "answers_as_before": True,
        "answer": "red", "unloaded": [], "faults": {}, "code": ["transformers_modules"],
    }  # fmt: skip
    monkeypatch.setattr("jina_vlm_tools.hub.embedding.run_alone", lambda *_: dict(good))
    assert embed(page[0], Base("me/base", home / "base"))["answer"] == "red"
    monkeypatch.setattr("jina_vlm_tools.hub.embedding.run_alone", lambda *_: good | said)
    with refused(message):
        embed(page[0], Base("me/base", home / "base"))


# The card ------------------------------------------------------------------------------------------------------------


def card_of(page, home, origin=ORIGIN, base=None, **kwargs):
    return write_card(page[0], "me/page", page[1], origin, base or Base("me/base", home / "base"), **kwargs)


def test_front_matter(page, home):
    origin = find_origin(str(home / "base"), origin="me/base")
    data = card_of(page, home, origin).data.to_dict()
    assert data["pipeline_tag"] == "visual-document-retrieval" and data["library_name"] == "sentence-transformers"
    assert (data["base_model"], data["base_model_relation"]) == ("me/base", "adapter")
    assert (data["license"], data["language"]) == ("cc-by-nc-4.0", ["en", "de"])
    assert {"sentence-transformers", "peft", "lora", "late-interaction", "multi-vector", "custom_code"} < set(
        data["tags"]
    )
    assert "model-index" not in data
    assert find_origin("jinaai/jina-vlm").license == "cc-by-nc-4.0"


def test_text_is_whole(page, home):
    text = card_of(page, home, base=Base("me/base", home / "base", "abc123")).text
    assert not re.search(
        r"{%|#|{{ |Undefined|None", re.sub(r"```.*?```|^#+ ", "", text, flags=re.DOTALL | re.MULTILINE)
    )
    assert re.findall("^## (.*)$", text, re.MULTILINE) == ["Usage", "What to know", "License", "Citation"]
    for said in (
        "(https://creativecommons.org/licenses/by-nc/4.0/)", "commit `abc123`", "LoRA of rank 4 on the decoder",
        "one vector of 32 numbers", "16 numbers for each token", "at most 4 tiles", "`Query:`", "`Passage:`",
        "No results are claimed here", "author        = {{Jina AI}},",
    ):  # fmt: skip
        assert said in text, said
    for language, code in re.findall(r"```(python|sh)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            ast.parse(code)
        assert "home" not in code
    for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        assert target.startswith("https://") or (page[0] / target).is_file()


def test_an_adapter_that_vllm_would_apply_in_part_is_to_be_merged_first(page, home, tmp_path):
    text = card_of(page, home).text
    assert "--lora-modules retrieval=me/page" in text and "--max-lora-rank 8" in text and "Merge it first" not in text
    (tmp_path / "page").mkdir()
    base = Base("me/base", home / "base")
    facts = retrieval.assemble(home / "connected", tmp_path / "page", base)
    text = " ".join(write_card(tmp_path / "page", "me/page", facts, ORIGIN, base).text.split())
    assert "--enable-lora" not in text and "jina-vlm merge me/page merged --multi" in text
    assert "This adapter changes the connector and the decoder. vLLM applies adapters to the decoder alone" in text


def test_an_adapter_of_a_rank_that_vllm_does_not_take_is_to_be_merged_first(page, home):
    made = write_card(page[0], "me/page", replace(page[1], rank=1024), ORIGIN, Base("me/base", home / "base"))
    assert "--enable-lora" not in made.text and '"model": "merged"' in made.text
    assert "vLLM takes no adapters of rank 1024. Merge it first" in made.text


def test_results_of_a_table_are_shown_as_they_are(page, home, tmp_path):
    results = tmp_path / "retrieval.csv"
    results.write_text("vectors,language,recall@1,low,high\nlate,en,81.5,79.0,84.0\ndense | 32,de,,66.0,71.5\n")
    made = card_of(page, home, results=read_results(results))
    assert "## Results\n\nAs measured, in `retrieval.csv`:\n\n" in made.text
    assert "| vectors | language | recall@1 | low | high |\n| --- | --- | ---: | ---: | ---: |\n" in made.text
    assert "| late | en | 81.5 | 79.0 | 84.0 |\n| dense \\| 32 | de |  | 66.0 | 71.5 |\n" in made.text
    assert "No results are claimed" not in made.text and "model-index" not in made.data.to_dict()
    for content in ("", "a,b\n", "a,b\n1\n"):
        results.write_text(content)
        with refused("--results .*retrieval.csv: not a table"):
            read_results(results)
    with refused("--results .*none.csv: FileNotFoundError"):
        read_results(tmp_path / "none.csv")


def test_results_of_a_command_become_a_model_index(page, home, tmp_path):
    result = {
        "task_type": "visual-document-retrieval", "dataset_type": "drawn", "dataset_name": "Drawn pages",
        "metric_type": "ndcg_at_5", "metric_value": 12.5,
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps({"command": "make eval", "results": [result]}))
    made = card_of(page, home, results=read_results(tmp_path / "results.json"))
    assert "| Drawn pages | ndcg_at_5 | 12.5 |" in made.text
    assert ModelCard.load(page[0] / "README.md").data.eval_results[0].metric_value == 12.5


# Sending -------------------------------------------------------------------------------------------------------------


def test_one_commit_holds_the_page(hub, page, home, tmp_path):
    card_of(page, home)
    names = retrieval.list_files(page[0])
    (tmp_path / "notes.txt").write_text("old")
    for repo_id, old, where in (("me/page", None, {}), ("me/old", "notes.txt", {"revision": "v2"})):
        if old:
            hub.put(repo_id, tmp_path)
        url = push(HfApi(), page[0], names, find_target(HfApi(), repo_id, **where), "Upload", private=not old)
        files = hub.files(repo_id, where.get("revision", "main"))
        del files[".gitattributes"]
        assert files == {name: (page[0] / name).read_bytes() for name in names}
        assert url.startswith(f"{hub.url}/{repo_id}/commit/") and hub.repositories[repo_id].private == (not old)
    assert "1_Dense/model.safetensors" in names and "notes.txt" in hub.files("me/old")
