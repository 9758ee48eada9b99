"""`jina-vlm train` on pairs of queries and pages: recipes, batches, runs that go on, what is written."""

import json
import random
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from jina_vlm import JinaVLMProcessor
from safetensors.torch import load_file

from jina_vlm_tools.cli.main import main
from jina_vlm_tools.files import TINY
from jina_vlm_tools.retrieval.embedder import JinaVLMEmbedder
from jina_vlm_tools.retrieval.pairs import Pairs, PairsCollator, read_stage
from jina_vlm_tools.synthetic.pages import draw_page
from jina_vlm_tools.synthetic.pages_data import task_page
from jina_vlm_tools.synthetic.searches import near_miss, query_about
from jina_vlm_tools.synthetic.shapes import TRAINING_PAIRS


pytest.importorskip("sentence_transformers")  # which writes the folder
RECIPE = {
    "model": str(TINY), "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "width": 16, "max_tiles": 1,
    "lora": {"rank": 2, "alpha": 2, "parts": ["decoder"]}, "precision": "fp32", "log_every": 1, "save_every": 1,
    "pairs": [{"name": "drawn", "path": "pairs.parquet", "query": "query", "image": "page", "negatives": ["other"]}],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pairs of pages, the last of which asks what the first asks, and of texts."""
    folder, rows = tmp_path_factory.mktemp("pairs"), []
    for seed in range(4):
        rng = random.Random(seed)
        page = task_page("shapes", rng, TRAINING_PAIRS)
        query = query_about(page, "en", rng).text
        rows.append({"query": query, "page": draw_page(page), "other": draw_page(near_miss(page, rng))})
    rows[3]["query"] = rows[0]["query"]
    features = datasets.Features(query=datasets.Value("string"), page=datasets.Image(), other=datasets.Image())
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "pairs.parquet")
    alike = [{"first": f"a red star {n}", "second": f"ein roter Stern {n}", "score": n / 4} for n in range(4)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alike))
    return folder


def write(folder: Path, name: str = "recipe", **changes) -> Path:
    recipe = {key: value for key, value in {**RECIPE, **changes}.items() if value is not None}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def losses(output: Path) -> list[float]:
    states = sorted(output.glob("run/checkpoint-*/trainer_state.json"), key=lambda file: int(file.parent.name[11:]))
    return [entry["loss"] for entry in json.loads(states[-1].read_text())["log_history"] if "loss" in entry]


def test_stages_go_on_and_give_what_an_uninterrupted_run_gives(folder, tmp_path):
    recipe = write(folder, steps=3)
    main(["train", str(recipe), "--output", str(tmp_path / "whole")])
    short = write(folder, "short", steps=3)
    run = tmp_path / "cut" / "run"
    main(["train", str(short), "--output", str(tmp_path / "cut")])
    for name in ("checkpoint-3",):  # as if it had been killed in the third step
        for file in (run / name).iterdir():
            file.unlink()
        (run / name).rmdir()
    main(["train", str(short), "--output", str(tmp_path / "cut"), "--resume"])
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    whole, cut = (JinaVLMEmbedder.from_pretrained(tmp_path / name / "retrieval") for name in ("whole", "cut"))
    texts = ["a red star", "47"]
    first, second = (one.embed(texts, role="query", kind="both") for one in (whole, cut))
    assert torch.allclose(first.dense, second.dense, atol=1e-5)
    assert [one.shape[1] for one in first.multi] == [16, 16]
    assert whole.processor.image_processor.max_tiles == 1


def test_a_second_stage_goes_on_with_adapter_and_projector(folder, tmp_path):
    main(["train", str(write(folder)), "--output", str(tmp_path / "one")])
    second = {"model": str(tmp_path / "one" / "retrieval"), "lora": None, "task": "text-matching", "loss": "cosent"}
    source = {"name": "texts", "path": "texts.jsonl", "query": "first", "text": "second", "score": "score"}
    recipe = write(folder, "matching", **second, pairs=[source])
    main(["train", str(recipe), "--output", str(tmp_path / "two")])
    before = JinaVLMEmbedder.from_pretrained(tmp_path / "one" / "retrieval")
    after = JinaVLMEmbedder.from_pretrained(tmp_path / "two" / "text-matching")
    assert (before.tasks, after.tasks) == (["retrieval"], ["text-matching"])
    assert torch.equal(before.projector.weight, after.projector.weight)  # CoSENT is of dense vectors alone
    one, other = (embedder.embed(["a red star"]).dense for embedder in (before, after))
    assert not torch.allclose(one, other, atol=1e-6)
    both = JinaVLMEmbedder.from_pretrained(
        tmp_path / "one" / "retrieval", adapters={"text-matching": str(tmp_path / "two" / "text-matching")}
    )
    assert torch.allclose(both.embed(["a red star"], task="text-matching").dense, other, atol=1e-6)
    assert torch.allclose(both.embed(["a red star"], task="retrieval").dense, one, atol=1e-6)


def test_a_second_stage_trains_the_tower_where_the_first_did(folder, tmp_path):
    lora = {"rank": 2, "alpha": 2, "parts": ["encoder"]}
    main(["train", str(write(folder, "one", lora=lora, steps=1)), "--output", str(tmp_path / "one")])
    second = write(folder, "two", model=str(tmp_path / "one" / "retrieval"), lora=None, steps=1)
    main(["train", str(second), "--output", str(tmp_path / "two")])
    one, two = (load_file(tmp_path / name / "retrieval" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and not any(torch.equal(one[name], two[name]) for name in one if "lora_B" in name)


def test_what_is_asked_twice_finds_both_pages(folder):
    stage = read_stage(write(folder, batch_size=4))
    pairs = Pairs(stage, folder / "recipe.yaml", 4)
    samples = sorted((pairs[index] for index in range(4)), key=lambda sample: sample["query"])
    batch = PairsCollator(JinaVLMProcessor.from_pretrained(TINY, max_tiles=1), 512)(samples)
    texts = [sample["query"] for sample in samples]
    expected = torch.tensor([[one == other for other in texts] + [False] * 4 for one in texts])
    assert torch.equal(batch["relevant"], expected) and expected.sum() == 6
    assert len(batch["documents"][0]["input_ids"]) == 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 1}, "`batch_size` is 1"),
        ({"temperature": 0}, "`temperature`"),
        ({"pairs": []}, "at least one source"),
        ({"pairs": [{"name": "x", "query": "query", "image": "page"}]}, "either `path` or `hub`"),
        ({"pairs": [{"name": "x", "path": "pairs.parquet", "query": "query"}]}, "what queries find"),
        ({"pairs": [{"name": "x", "path": "pairs.parquet", "query": "query", "image": "picture"}]}, "query, page"),
        ({"pairs": [{"name": "x", "path": "none.parquet", "query": "query", "image": "page"}]}, "cannot be opened"),
        ({"loss": "cosent"}, "score"),
        ({"lora": None}, "settings of an adapter"),
        ({"batch_size": 8}, "it has 4 rows"),
    ],
)  # fmt: skip
def test_bad_recipes_are_refused_by_key(folder, tmp_path, changes, said):
    recipe = write(folder, "bad", **{**changes, "lora": changes.get("lora", RECIPE["lora"])})
    with pytest.raises(SystemExit, match=said):
        main(["train", str(recipe), "--output", str(tmp_path / "out")])
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["retrieval_pairs", "retrieval_negatives", "text_matching"])
def test_recipes_that_come_along_are_read_and_copied(name, tmp_path, capsys):
    main(["train", name, "--copy", str(tmp_path)])
    assert capsys.readouterr().out.split() == [str(tmp_path / f"{name}.yaml")]
    assert read_stage(tmp_path / f"{name}.yaml").steps
