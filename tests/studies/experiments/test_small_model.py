"""The small model's own way: random weights, taught to see, trained in two stages, asked."""

import json
import os
import subprocess
import sys

import datasets
import jina_vlm
import pytest
import torch
from conftest import ROOT
from PIL import Image

from experiments import eval_pages, seeing, small_model
from jina_vlm_tools.synthetic import pages_data
from jina_vlm_tools.synthetic.page_questions import TASKS
from jina_vlm_tools.training.muon import Muon, muon_groups


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


@pytest.mark.slow
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


@pytest.mark.parametrize("stage", [pytest.param("small_stage1", marks=pytest.mark.slow), "small_stage2"])
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
