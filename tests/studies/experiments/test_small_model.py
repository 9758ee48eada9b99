"""The small model's own way: random weights, taught to see, trained in two stages, asked; and what its data are
worth."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import jina_vlm
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image

from experiments import eval_pages, leave_one_out, seeing, small_model
from jina_vlm_tools.synthetic import pages_data
from jina_vlm_tools.synthetic.page_questions import TASKS
from jina_vlm_tools.training.muon import Muon, muon_groups
from jina_vlm_tools.training.stages import read_stage


@pytest.fixture(scope="module")
def new_model(tmp_path_factory):
    """A checkpoint of random weights, as the command writes it."""
    folder = tmp_path_factory.mktemp("small") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["small_model", "--output", str(folder)])
        small_model.main()
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A few pages of each source, where the recipes look for them."""
    folder = tmp_path_factory.mktemp("pages")
    pages_data.write(folder, stage1=12, stage2=6, texts=6, held_out=12)
    return folder


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_a_new_model_has_the_released_geometry(new_model):
    model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(new_model)
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(new_model)
    config = model.config
    assert (config.vision_config.image_size, config.vision_config.patch_size, config.pooling_size) == (378, 14, 2)
    assert processor.patch_token_id == config.image_token_id and len(config.structural_token_ids) == 6
    assert not model.get_input_embeddings().weight[config.image_token_id].any()
    inputs = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.new("RGB", (500, 300))},
                    {"type": "text", "text": "What?"},
                ],
            }
        ],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert torch.isfinite(model(**inputs).logits).all()


def test_seeing_is_learned(new_model):
    """A few pages, seen again and again."""
    torch.manual_seed(0)
    reader = seeing.PageReader(jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(new_model))
    collator = seeing.PageCollator(jina_vlm.JinaVLMProcessor.from_pretrained(new_model).image_processor)
    dataset = seeing.PagesDataset(3, first_seed=0)
    pages = [dataset[index] for index in range(3)]
    batch, optimizer = collator(pages), Muon(muon_groups(reader, 4e-3, weight_decay=0.02))
    losses = []
    for _ in range(25):
        loss = reader(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert seeing.measure(reader, collator, pages)["place"] > 0.6  # 11 % by guessing


def test_seeing_as_a_command(new_model, tmp_path, monkeypatch, capsys):
    """It trains tower and connector alone, prints what it sees on fresh pages, and makes image tokens as large as
    words."""
    monkeypatch.setattr(
        sys, "argv", ["seeing", "--model", str(new_model), "--output", str(tmp_path / "seeing"), "--pages", "16"]
    )
    seeing.main()
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if line.endswith("%"))
    assert {"characters", "words", "color", "kind", "place", "height", "column", "row"} == set(printed)
    before = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(new_model)
    after = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(tmp_path / "seeing")
    for name, parameter in after.named_parameters():
        changed = not torch.equal(parameter, before.get_parameter(name))
        assert changed == (("vision_model" in name or "connector" in name) and "post_layernorm" not in name), name
    dataset = seeing.PagesDataset(4, first_seed=0)
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(tmp_path / "seeing")
    pixels = seeing.PageCollator(processor.image_processor)([dataset[index] for index in range(4)])["pixel_values"]
    with torch.no_grad():
        tokens = after.model.connector(
            after.model.vision_model(pixels).last_hidden_state, torch.ones(4, dtype=torch.bool)
        )
    ratio = tokens.pow(2).mean().sqrt() / after.get_input_embeddings().weight.pow(2).mean().sqrt()
    assert 0.7 < ratio < 1.4


@pytest.mark.parametrize("stage", ["small_stage1", "small_stage2"])
def test_recipes_name_the_files_that_are_drawn(stage, pages, new_model, tmp_path, monkeypatch):
    """Every source of the recipes' mixtures is there and in a layout, with the tasks and weights that they name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "pages").symlink_to(pages)
    for file in (ROOT / "experiments" / "recipes").glob("small_*.yaml"):
        (tmp_path / "recipes" / file.name).write_text(file.read_text())
    command = [
        sys.executable,
        "-m",
        "jina_vlm_tools",
        "train",
        str(tmp_path / "recipes" / f"{stage}.yaml"),
        "--output",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, "--model", str(new_model), "--plan-only"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "0 of 6 samples are bad" in done.stdout
    tasks = next(line for line in done.stdout.splitlines() if line.startswith("task: "))
    assert all(task in tasks for task in (TASKS if stage == "small_stage2" else ("description",)))
    # Leaving one out is stage two, shorter.
    recipes = tmp_path / "recipes"
    assert read_stage(recipes / "small_leave_one_out.yaml")[1] == read_stage(recipes / "small_stage2.yaml")[1]


# ---------------------------------------------------------------------------------------------------------------------
# Asking
# ---------------------------------------------------------------------------------------------------------------------


def test_pages_are_asked(tmp_path, monkeypatch, capsys):
    """Tasks, languages and intervals; and fewer tiles where that is asked for."""
    seen = []
    ask = eval_pages.ask

    def watched(model, processor, *arguments):
        seen.append(processor.image_processor.max_tiles)
        return ask(model, processor, *arguments)

    monkeypatch.setattr(eval_pages, "ask", watched)
    file = tmp_path / "answers.json"
    arguments = [
        "--checkpoint",
        str(ROOT / "checkpoints" / "tiny"),
        "--samples",
        "36",
        "--json",
        str(file),
        "--max-tiles",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["eval_pages", *arguments, "--tasks", "shapes", "small print"])
    eval_pages.main()
    printed = capsys.readouterr().out
    results = json.loads(file.read_text())
    assert (
        len(results) == 12 and {result["task"] for result in results} == {"shapes", "small print"} and set(seen) == {1}
    )
    right = sum(result["right"] for result in results if result["task"] == "shapes")
    low, high = eval_pages.wilson(right, 6)
    assert (
        f"| shapes | {100 * right / 6:.1f} ({100 * low:.1f} to {100 * high:.1f}; 6) |" in printed
        and "| numbers |" not in printed
    )
    assert right >= 3  # it is a checkpoint that knows shapes, and four of the six languages


# ---------------------------------------------------------------------------------------------------------------------
# Leaving one out
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, pages, new_model):
    """A stage and its mixture of three tasks, one of them of two sources."""
    common = {"domain": "none", "language": "en"}
    sources = [
        {
            "name": "a",
            "path": str(pages / "stage2" / "numbers.parquet"),
            "weight": 0.3,
            "task": "numbers",
            "modality": "image-text",
        },
        {
            "name": "b",
            "path": str(pages / "stage2" / "words.parquet"),
            "weight": 0.3,
            "task": "words",
            "modality": "image-text",
        },
        {
            "name": "c",
            "path": str(pages / "stage2" / "shapes.parquet"),
            "weight": 0.2,
            "task": "words",
            "modality": "image-text",
        },
        {
            "name": "d",
            "path": str(pages / "stage2" / "text.jsonl"),
            "weight": 0.2,
            "task": "reading",
            "modality": "text",
        },
    ]
    mixture = {"text_share": 0.2, "sources": [{**source, **common} for source in sources]}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    part = {"learning_rate": 1e-3}
    stage = {"model": str(new_model), "mixture": "mixture.yaml", "steps": 2, "global_batch_size": 2, "batch_size": 2}
    stage |= {
        "encoder": {"learning_rate": 0},
        "connector": part,
        "decoder": part,
        "optimizer": "muon",
        "precision": "fp32",
    }
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(stage | {"gradient_checkpointing": False}))
    return tmp_path / "stage.yaml"


def test_a_mixture_without_a_task(recipe):
    """The rest's weights keep their proportions, and add up to 1."""
    _, mixture = read_stage(recipe)
    smaller = leave_one_out.without(mixture, "words")
    assert {source.name: round(source.weight, 6) for source in smaller.sources} == {"a": 0.6, "d": 0.4}
    assert smaller.text_share is None and len(mixture.sources) == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_left_out_once_for_each_seed(recipe, tmp_path, monkeypatch, workers):
    """Trainings stand in for by their stages' files, which are read again; what was done is not done again."""
    ran, fail = [], []

    def run(command, env, check):
        executable, option, module, *arguments = command
        assert (executable, option, check) == (sys.executable, "-m", True)
        assert int(env["OMP_NUM_THREADS"]) == max(1, os.cpu_count() // workers)
        if module == "jina_vlm_tools":
            if fail and len(ran) >= fail[0]:
                raise subprocess.CalledProcessError(1, module)
            stage, mixture = read_stage(arguments[1])
            ran.append((stage.seed, tuple(source.name for source in mixture.sources), stage.steps))
            return
        stage, mixture = read_stage(Path(arguments[arguments.index("--checkpoint") + 1]).parent / "stage.yaml")
        names = [source.name for source in mixture.sources]
        right = {"numbers": "a" in names, "words": "b" in names and stage.seed > 0}
        results = [{"task": task, "right": right.get(task, True)} for task in TASKS for _ in range(4)]
        Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps(results))

    monkeypatch.setattr(leave_one_out, "subprocess", SimpleNamespace(run=run))
    command = [
        "leave_one_out",
        str(recipe),
        "--output",
        str(tmp_path / "out"),
        "--seeds",
        "0",
        "1",
        "2",
        "--leave-out",
        "numbers",
        "words",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--workers", str(workers)])
    fail.append(4)
    with pytest.raises(subprocess.CalledProcessError):
        leave_one_out.main()
    fail.clear()
    leave_one_out.main()
    assert sorted(ran) == sorted(
        (seed, names, 2) for names in (("a", "b", "c", "d"), ("b", "c", "d"), ("a", "d")) for seed in (0, 1, 2)
    )
    rows = list(csv.DictReader((tmp_path / "out" / "changes.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 2 * len(TASKS)
    (numbers,) = [row for row in rows if row["left_out"] == "numbers" and row["task"] == "numbers"]
    assert [numbers[key] for key in ("with_all", "change", "low", "high", "per_seed")] == [
        "100.0",
        "-100.0",
        "-100.0",
        "-100.0",
        "-100.0 -100.0 -100.0",
    ]
    (words,) = [row for row in rows if row["left_out"] == "words" and row["task"] == "words"]
    # Two of three seeds fall from right to wrong: -66.7, and t(2) = 4.303 standard errors of 33.3 to either side.
    assert (words["with_all"], words["change"], words["low"], words["high"]) == ("66.7", "-66.7", "-210.1", "76.8")
    with Image.open(tmp_path / "out" / "changes.png") as image:
        assert image.width > 600 and image.height > 150


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--leave-out", "maps"],
            "'maps': no source of the mixture has this task. Known are: numbers, words, reading.",
        ),
        (["--samples", "5"], "--samples: expected at least 6, one for each task, got 5"),
        (["--seeds", "1"], "--seeds: expected 2 to 10 different numbers"),
        (["--seeds", "1", "1"], "--seeds: expected 2 to 10 different numbers"),
        (["--workers", "0"], "--workers: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_said_before_anything_is_trained(recipe, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(leave_one_out, "train_and_ask", lambda *_: pytest.fail("something was run"))
    monkeypatch.setattr(sys, "argv", ["leave_one_out", str(recipe), "--output", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit, match=message):
        leave_one_out.main()


def test_one_training_left_out_for_real(recipe, tmp_path):
    """Of the command's own trainings and questions, one."""
    stage, mixture = read_stage(recipe)
    scores = leave_one_out.train_and_ask(
        dataclasses.replace(stage, seed=1),
        leave_one_out.without(mixture, "words"),
        recipe,
        tmp_path / "words-1",
        samples=6,
        threads=1,
    )
    assert set(scores) == set(TASKS) and all(0 <= score <= 1 for score in scores.values())
    assert (tmp_path / "words-1" / "model" / "model.safetensors").is_file()
