"""A stage from YAML: trained, stopped and gone on with, by one process and by two."""

import io
import json
import math
import os
import random
import shutil
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
from miniature import save_miniature
from PIL import Image
from processes import found_in
from safetensors.torch import load_file
from stages import history, run, write_stage
from transformers import AutoModelForImageTextToText, Qwen3Config

from jina_vlm_tools.cli.main import main
from jina_vlm_tools.cli.train import RECIPES, find_recipe
from jina_vlm_tools.training import train as command
from jina_vlm_tools.training.mixture import shares
from jina_vlm_tools.training.precision import cpu_multiplies_in_bf16
from jina_vlm_tools.training.settings import SettingsError
from jina_vlm_tools.training.stages import PartSettings, read_stage
from jina_vlm_tools.training.trainer import cosine, part_of, see_blank_images


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module", autouse=True)
def caches(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("TENSORBOARD_LOGGING_DIR", "")  # the command sets it; so it is taken back
        yield


def png(height: int, width: int, value: int) -> dict:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (value * 37 % 256, value * 11 % 256, 90)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    return save_miniature(tmp_path_factory.mktemp("miniature"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of two to four tiles, and texts."""
    folder, rng = tmp_path_factory.mktemp("stage"), random.Random(0)
    turn = {"user": datasets.Value("string"), "assistant": datasets.Value("string")}
    answers = ["the quick brown fox", "the lazy dog", "jumps over"]
    rows = [
        {
            "images": [png(rng.choice((100, 300, 900)), 200, i)],
            "texts": [{"user": f"which {i}?", "assistant": answers[i % 3]}],
        }
        for i in range(40)
    ]
    features = datasets.Features(images=datasets.List(datasets.Image()), texts=datasets.List(turn))
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "images.parquet")
    datasets.Dataset.from_list(rows[:5], features=features).to_parquet(folder / "held_out.parquet")
    with open(folder / "text.jsonl", "w") as file:
        for i in range(20):
            chat = [{"role": "user", "content": "which? " * i}, {"role": "assistant", "content": answers[i % 3]}]
            file.write(json.dumps({"messages": chat}) + "\n")
    common = {"task": "vqa", "domain": "none", "language": "en"}
    mixture = {
        "text_share": 0.4,
        "sources": [
            {"name": "images", "path": "images.parquet", "weight": 0.6, "modality": "image-text", **common},
            {"name": "text", "path": "text.jsonl", "weight": 0.4, "modality": "text", **common},
        ],
    }
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixture))
    return folder


STAGE = {
    "mixture": "mixture.yaml",
    "steps": 6,
    "global_batch_size": 4,
    "batch_size": 2,
    "max_tiles": 2,
    "precision": "fp32",
    "gradient_checkpointing": False,
    "encoder": {"learning_rate": 0.0},
    "connector": {"learning_rate": "1e-3", "warmup_steps": 1},
    "decoder": {"learning_rate": "5e-4", "warmup_steps": 3},
    "log_every": 1,
    "save_every": 3,
}


@pytest.fixture
def write(folder, miniature):
    def write(**changes):
        return write_stage(folder / "stage.yaml", {**STAGE, "model": str(miniature), **changes})

    return write


@pytest.fixture(scope="module")
def trained(folder, miniature, tmp_path_factory):
    """A whole run, with evaluation."""
    output = tmp_path_factory.mktemp("trained")
    file = folder / "trained.yaml"
    evaluation = {"path": "held_out.parquet", "every": 3, "samples": 5, "max_new_tokens": 4, "batch_size": 2}
    file.write_text(yaml.safe_dump({**STAGE, "model": str(miniature), "evaluation": evaluation}))
    run(file, "--output", output)
    return file, output


# ---------------------------------------------------------------------------------------------------------------------
# One process
# ---------------------------------------------------------------------------------------------------------------------


def test_the_trained_folder_loads_by_itself(trained, processor):
    model = AutoModelForImageTextToText.from_pretrained(trained[1], trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    assert (trained[1] / "tokenizer.json").exists() and "generation" in (
        trained[1] / "chat_template.jinja"
    ).read_text()


def test_frozen_parts_stay_and_others_move(trained, miniature):
    found, before = (load_file(folder / "model.safetensors") for folder in (trained[1], miniature))
    moved = {
        part_of(name) for name, tensor in found.items() if not torch.equal(tensor, before[name].to(torch.bfloat16))
    }
    assert moved == {"connector", "decoder"} and {part_of(name) for name in found} == {
        "encoder",
        "connector",
        "decoder",
    }


def test_each_part_has_its_learning_rate(trained):
    peak = {"connector": 1e-3, "decoder": 5e-4}
    warmup = {"connector": 1, "decoder": 3}
    for part, rate in peak.items():
        found = history(trained[1], f"learning_rate_{part}")
        expected = [rate * cosine(step, PartSettings(rate, warmup[part]), 6) for step in range(1, 7)]
        assert found == pytest.approx(expected)
        assert max(found) == pytest.approx(rate) and found.index(max(found)) == warmup[part] - 1
    assert not history(trained[1], "learning_rate_encoder")


def test_questions_are_asked_before_during_and_after(trained):
    assert len(history(trained[1], "eval_accuracy")) == 3 and all(
        0 <= share <= 1 for share in history(trained[1], "eval_accuracy")
    )
    assert len(history(trained[1], "eval_loss")) == 3


def test_curves(trained):
    with Image.open(trained[1] / "run" / "curves.png") as curves:
        assert curves.width > 1000 and len(curves.convert("RGB").getcolors(1 << 24)) > 100
    assert list((trained[1] / "run" / "tensorboard").glob("events*"))


def test_a_run_goes_on_to_the_same_losses(trained, tmp_path, monkeypatch):
    """From step 3 of 6, in the middle of everything, past a checkpoint that was not finished."""
    file, output = trained
    shutil.copytree(output / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoint-6" / "trainer_state.json").unlink()  # killed while it was written
    run(file, "--output", tmp_path, "--resume")
    assert history(tmp_path, "loss") == history(output, "loss") and len(history(tmp_path, "loss")) == 6
    assert history(tmp_path, "eval_loss")[-1] == history(output, "eval_loss")[-1]
    expected, found = (load_file(folder / "model.safetensors") for folder in (output, tmp_path))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_does_not_go_on_with_other_settings(trained, tmp_path, monkeypatch, folder, write):
    shutil.copytree(trained[1] / "run", tmp_path / "run")
    stage = yaml.safe_load(trained[0].read_text())
    with pytest.raises(SystemExit, match=r"stage.yaml: `stage.seed` is 1: the run in .* began with 0"):
        run(write(**{**stage, "seed": 1}), "--output", tmp_path, "--resume")
    with pytest.raises(SystemExit, match="holds a run already"):
        run(write(), "--output", tmp_path)
    with pytest.raises(SystemExit, match="holds no checkpoint"):
        run(write(), "--output", tmp_path / "new", "--resume")


def test_bf16_and_gradient_checkpointing(trained, write, tmp_path, monkeypatch):
    """Nearly the same losses."""
    run(
        write(
            precision="bf16",
            gradient_checkpointing=True,
            steps=2,
            save_every=2,
            connector={"learning_rate": 1e-3},
            decoder={"learning_rate": 5e-4},
        ),
        "--output",
        tmp_path,
    )
    assert history(tmp_path, "loss")[0] == pytest.approx(history(trained[1], "loss")[0], rel=0.02)


def test_adapters_are_trained_and_saved_alone(write, tmp_path, monkeypatch, miniature):
    """Each part at its own rate; loaded into the checkpoint that it began with."""
    lora = {"rank": 4, "alpha": 8, "parts": ["connector", "decoder"]}
    run(write(lora=lora, steps=3, save_every=3), "--output", tmp_path)
    assert (tmp_path / "adapter_config.json").exists() and not (tmp_path / "model.safetensors").exists()
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {part_of(name) for name in weights} == {"connector", "decoder"}
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(miniature)
    model.load_adapter(str(tmp_path))
    assert history(tmp_path, "learning_rate_connector")[0] == pytest.approx(
        2 * history(tmp_path, "learning_rate_decoder")[0] * 3 * cosine(1, PartSettings(1, 1), 3)
    )


@pytest.mark.parametrize("name", ["stage1", "stage2", "finetune_lora", "grpo_lora", "tiny", "grpo_counting"])
def test_recipes_are_what_the_code_understands(name, tmp_path, monkeypatch):
    """All but their files, which are made or brought: here they are empty."""
    monkeypatch.chdir(tmp_path)
    for file in (
        "mine/one.jsonl",
        *(f"runs/shapes/{name}.parquet" for name in ("train", "held_out", "counting", "held_out_counting")),
        "runs/shapes/text.jsonl",
    ):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    of_experiments = ROOT / "experiments" / "recipes" / f"{name}.yaml"
    stage, mixture = read_stage(of_experiments if of_experiments.exists() else find_recipe(name))
    assert (stage.lora is not None) == (name in ("finetune_lora", "grpo_lora", "grpo_counting"))
    assert (stage.grpo is not None) == name.startswith("grpo")


def test_a_recipe_is_copied_to_be_edited(tmp_path, capsys):
    copies = [tmp_path / "recipes" / name for name in ("finetune_lora.yaml", "finetune_mixture.yaml")]
    main(["train", "finetune_lora", "--copy", str(tmp_path / "recipes")])
    assert capsys.readouterr().out.splitlines() == list(map(str, copies))
    assert [copy.read_bytes() for copy in copies] == [(RECIPES / copy.name).read_bytes() for copy in copies]
    copies[1].write_text("mine")
    with pytest.raises(SystemExit, match=r"finetune_lora.yaml: already there. Name another"):
        main(["train", "finetune_lora", "--copy", str(tmp_path / "recipes")])
    main(["train", "grpo_lora", "--copy", str(tmp_path / "recipes")])  # of the same mixture
    assert capsys.readouterr().out.endswith(f"grpo_lora.yaml\n{copies[1]} (kept as it is)\n")
    assert copies[1].read_text() == "mine"
    with pytest.raises(SystemExit):
        main(["train", "finetune_lora", "--copy", str(tmp_path / "other"), "--resume"])
    assert "--resume is for training" in capsys.readouterr().err and not (tmp_path / "other").exists()


PAPER = {  # arXiv 2512.04032, table 2; warm-ups are 10 % of the steps, but 1 % for the connector in stage one
    "stage1": {
        "encoder": PartSettings(6e-6, 2500, 0.1),
        "connector": PartSettings(2e-4, 250, 0.1),
        "decoder": PartSettings(2e-5, 2500, 0.1),
        "steps": 25_000,
        "global_batch_size": 128,
        "text": 0.15,
        "single_source": 0.0,
    },
    "stage2": {
        "encoder": PartSettings(5e-6, 6000, 0.1),
        "connector": PartSettings(5e-6, 6000, 0.1),
        "decoder": PartSettings(1e-5, 6000, 0.1),
        "steps": 60_000,
        "global_batch_size": 256,
        "text": 0.1779,
        "single_source": 0.5,
    },
}


@pytest.mark.parametrize("name", PAPER)
def test_stages_are_the_papers(name):
    stage, mixture = read_stage(find_recipe(name))
    paper = PAPER[name]
    assert stage.parts == {part: paper[part] for part in ("encoder", "connector", "decoder")}
    assert (stage.steps, stage.global_batch_size) == (paper["steps"], paper["global_batch_size"])
    assert (stage.optimizer, stage.beta2, stage.eps) == ("adamw", 0.95, 1e-6)
    found = shares(mixture)
    assert mixture.text_share == found["modality"]["text"] == paper["text"]
    assert mixture.single_source_share == paper["single_source"]
    if name == "stage2":
        assert found["language"] == {"en": 0.8517, "multilingual": 0.1483}


def test_the_optimizer_is_the_stages(write, tmp_path):
    stage, mixture = read_stage(file := write(beta2=0.95, eps=1e-6, weight_decay=0.1))
    optimizer = command.make_trainer(stage, mixture, file, tmp_path, 1).create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-6) and group["weight_decay"] in (0.1, 0.0)


def test_a_plan_builds_no_model(write, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command.jina_vlm.JinaVLMForConditionalGeneration, "__init__", None)
    run(write(), "--output", tmp_path / "none", "--plan-only")
    printed = capsys.readouterr().out
    assert "modality: image-text 60.0%, text 40.0%" in printed and "images: 0 of 40 samples are bad" in printed
    assert "padding: " in printed and not (tmp_path / "none").exists()


def test_another_template_is_told(miniature, tmp_path, caplog):
    """One that does not mark answers, as a release's, gives its place to ours, not silently; others are kept."""
    folder = shutil.copytree(miniature, tmp_path / "released")
    config, ours = jina_vlm.JinaVLMConfig.from_pretrained(folder), (folder / "chat_template.jinja").read_text()
    for template, expected, said in (("{{ messages }}", ours, 1), (f"{ours} ", f"{ours} ", 0)):
        (folder / "chat_template.jinja").write_text(template)
        stage = SimpleNamespace(model=str(folder), max_tiles=None)
        assert command.load_processor(stage, tmp_path / "stage.yaml", config).chat_template == expected
        assert caplog.text.count("does not mark what assistants say") == said
        caplog.clear()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lerning_rate": 1}, "`lerning_rate` is 1: this key is unknown"),
        ({"steps": None}, "`steps` is None: this key is missing"),
        ({"steps": 0}, "`steps` is 0: expected at least 1"),
        (
            {"global_batch_size": 5},
            "`global_batch_size` is 5: expected a multiple of `batch_size` \\(2\\) times the number of processes",
        ),
        ({"decoder": {"learning_rate": "fast"}}, "`decoder.learning_rate` is 'fast': expected a number"),
        ({"decoder": {"learning_rate": 1e-4, "warmup": 3}}, "`decoder.warmup` is 3: this key is unknown"),
        (
            {"decoder": {"learning_rate": 1e-4, "warmup_steps": 7}},
            "`decoder.warmup_steps` is 7: expected 0 to `steps` \\(6\\)",
        ),
        ({"decoder": {"learning_rate": -1}}, "`decoder` is .*: expected a learning rate from 0"),
        (
            {"connector": {"learning_rate": 0}, "decoder": {"learning_rate": 0}},
            "`encoder, connector, decoder` is 0.0: no part that is trained has a learning rate",
        ),
        ({"mixture": "none.yaml"}, "`mixture` is 'none.yaml': no file has this name"),
        ({"eps": 0}, "`eps` is 0.0: expected a number above 0"),
        ({"decoder": {"learning_rate": ".nan"}}, "`decoder.learning_rate` is '.nan': expected a number"),
        ({"weight_decay": math.inf}, "`weight_decay` is inf: expected a number"),
        ({"weight_decay": -1}, "`weight_decay` is -1.0: expected 0 or more"),
        ({"max_grad_norm": -1}, "`max_grad_norm` is -1.0: expected 0 or more"),
        ({"seed": -1}, "`seed` is -1: expected 0 or more"),
        ({"workers": -1}, "`workers` is -1: expected 0 or more"),
        ({"max_tiles": 0}, "`max_tiles` is 0: expected 1 or more"),
        ({"lora": {"rank": 0, "alpha": 8}}, "`lora` is .*: expected a `rank` of 1 or more"),
        ({"lora": {"rank": 2, "alpha": 8, "dropout": 1}}, "`lora` is .* a `dropout` from 0 to below 1"),
        ({"beta2": 1}, "`beta2` is 1.0: expected a number from 0 to below 1"),
        ({"optimizer": "muon", "eps": "1e-6"}, "`eps` is 1e-06: the optimizer muon has its own. Leave it out"),
        ({"optimizer": "muon", "beta2": 0.95}, "`beta2` is 0.95: the optimizer muon has its own. Leave it out"),
        ({"precision": "fp8"}, "`precision` is 'fp8': expected one of bf16, fp32"),
        (
            {"lora": {"rank": 4, "alpha": 8, "parts": ["head"]}},
            r"`lora.parts\[0\]` is 'head': expected one of encoder",
        ),
        (
            {"evaluation": {"path": "x.parquet", "every": 1, "samples": 1, "max_new_tokens": 1}},
            "`evaluation.path` is 'x.parquet'",
        ),
    ],
)
def test_stages_that_cannot_be(write, changes, message):
    with pytest.raises(SettingsError, match=f"stage.yaml: {message}"):
        read_stage(write(**changes))


def test_checkpoints_of_other_models(write, tmp_path, monkeypatch, bundle):
    """Refused before a model is built."""
    monkeypatch.setattr(command.jina_vlm.JinaVLMForConditionalGeneration, "__init__", None)
    Qwen3Config(num_hidden_layers=1).save_pretrained(tmp_path / "qwen")
    with pytest.raises(SystemExit, match="`model` is '.*qwen': expected a jina-vlm, but its config is of 'qwen3'"):
        run(write(model=str(tmp_path / "qwen")), "--output", tmp_path / "out")
    with pytest.raises(SystemExit, match="`model` is 'nowhere/at-all': its config cannot be read"):
        run(write(model="nowhere/at-all"), "--output", tmp_path / "out")
    shutil.copytree(bundle, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["image_token_id"] = config["structural_token_ids"][0]
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="its tokenizer's <im_patch> is .*, its config's"):
        run(write(model=str(tmp_path / "other")), "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_questions_that_cannot_be_read(write, folder, monkeypatch, tmp_path):
    (folder / "captions.jsonl").write_text('{"image": "a.png", "shows": "a fox"}\n')
    questions = {"path": "captions.jsonl", "every": 3, "samples": 5, "max_new_tokens": 4}
    with pytest.raises(
        SystemExit, match="`evaluation.path` is 'captions.jsonl': it has the columns image, shows, but none of"
    ):
        run(write(evaluation=questions), "--output", tmp_path)


@pytest.mark.parametrize("key", ["every", "samples", "max_new_tokens", "batch_size"])
def test_evaluation_of_nothing(write, folder, tmp_path, key):
    (folder / "asked.jsonl").write_text('{"inputs": "What?", "targets": "A fox."}\n')
    questions = {"path": "asked.jsonl", "every": 3, "samples": 5, "max_new_tokens": 4} | {key: 0}
    with pytest.raises(SystemExit, match=f"`evaluation.{key}` is 0: expected 1 or more"):
        run(write(evaluation=questions), "--output", tmp_path)


def test_questions_without_answers(write, folder, tmp_path):
    turns = [("user", "What?"), ("assistant", "A fox."), ("user", "Why?")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (folder / "open.jsonl").write_text(json.dumps(row) + "\n")
    questions = {"path": "open.jsonl", "every": 3, "samples": 5, "max_new_tokens": 4}
    with pytest.raises(SystemExit, match="row 0 ends in a turn of user, expected the right answer there"):
        run(write(evaluation=questions), "--output", tmp_path)


def test_weights_are_not_replaced(write, bundle, tmp_path):
    """Not those that training starts from, either."""
    shutil.copytree(bundle, tmp_path / "copy")
    before = (tmp_path / "copy" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="copy holds weights already .model.safetensors., which would be replaced"):
        run(write(model=str(tmp_path / "copy")), "--output", tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == before


def test_a_batch_without_images_reaches_every_parameter(new_model, chat):
    """With zeros in tower and connector, and changes no loss."""
    batch = chat([("user", "the lazy dog"), ("assistant", "jumps")])
    expected = new_model(**batch, labels=batch["input_ids"]).loss
    see_blank_images(new_model)
    loss = new_model.train()(**batch, labels=batch["input_ids"]).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in new_model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    assert {part_of(name) for name, gradient in gradients.items() if gradient.any()} == {"decoder"}


# ---------------------------------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------------------------------


def two_processes(code: str, *args, cache: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            map(str, (ROOT / "tests", ROOT / "tests" / "helpers", Path(__file__).parent, ROOT))
        ),
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": cache,
    }
    result = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--no-python",
            sys.executable, "-c", code, *map(str, args),
        ],
        capture_output=True, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-6000:]
    return result.stdout


TRAIN = """
import conftest, sys
from jina_vlm_tools.cli.main import main
main(["train", *sys.argv[1:]])
"""


def test_two_processes_give_the_losses_of_one(trained, tmp_path, cache):
    """At the same global batch, with other numbers of tiles on each, and text alone on one of them."""
    file, output = trained
    stage, _ = read_stage(file)
    collator = command.JinaVLMCollator(command.load_processor(stage, file, command.load_config(stage, file)))
    _, mixture = read_stage(file)
    batches = list(command.make_plan(stage, mixture, file, collator))
    tiles = [sum(place.tiles for place in batch) for batch in batches]
    assert any(a != b for a, b in zip(tiles[::2], tiles[1::2], strict=True))
    assert any((a == 0) != (b == 0) for a, b in zip(tiles[::2], tiles[1::2], strict=True)), "text alone on one"
    two_processes(TRAIN, file, "--output", tmp_path, cache=cache)
    for name in ("loss", "eval_loss", "grad_norm"):
        assert history(tmp_path, name) == pytest.approx(history(output, name), abs=1e-4), name
    assert history(tmp_path, "eval_accuracy") == history(output, "eval_accuracy")
    assert len(history(tmp_path, "loss")) == 6
    expected, found = (load_file(folder / "model.safetensors") for folder in (output, tmp_path))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), atol=1e-3, rtol=1e-2)


def rows() -> list[dict]:
    """Texts, and chats of one or two images, of one tile or two."""
    return [
        {
            "images": [Image.new("RGB", (200, (100, 900)[i % 2]), (50 * i, 9, 9))] * (i % 3),
            "texts": [{"user": "which? " * i, "assistant": "star " * (i + 1)}],
        }
        for i in range(5)
    ]


# By the library's Trainer itself, with other numbers of tiles on each process, and an odd number of chats.
EVALUATE = """
import conftest, sys, torch, jina_vlm
from jina_vlm.compatibility_jina_vlm import CACHE_NAME
from processes import leave
from transformers import Trainer, TrainingArguments
from test_train import rows
from jina_vlm_tools.training import JinaVLMCollator

folder, output = sys.argv[1:]
model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(folder)
collator = JinaVLMCollator(jina_vlm.JinaVLMProcessor.from_pretrained(folder))
collator.processor.image_processor.max_tiles = 2


def compute(prediction):
    answered = prediction.label_ids != -100
    guesses = (prediction.predictions * answered).sum(axis=1)
    return {"labels": answered.sum(axis=1).tolist(), "guesses": guesses.tolist()}


args = TrainingArguments(
    output,
    per_device_eval_batch_size=1,
    use_cpu=True,
    remove_unused_columns=False,
    report_to="none",
    label_names=["labels"],
    ddp_backend="gloo",
)
trainer = Trainer(
    model,
    args,
    collator,
    eval_dataset=rows(),
    compute_metrics=compute,
    preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1).roll(1, dims=1),
)
found = trainer.evaluate(ignore_keys=[CACHE_NAME, "image_outputs"])
leave({key: found[key] for key in ("eval_labels", "eval_guesses")})
"""


@pytest.mark.slow
@torch.no_grad()
def test_evaluation_gathers_chats_of_different_images(miniature, tmp_path, cache):
    """What each chat gives by itself, in their order."""
    model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(miniature).eval()
    collator = command.JinaVLMCollator(jina_vlm.JinaVLMProcessor.from_pretrained(miniature))
    collator.processor.image_processor.max_tiles = 2
    labels, guesses = [], []
    for row in rows():
        batch = collator([row])
        answered = batch["labels"] != -100
        labels.append(answered.sum().item())
        guesses.append(model(**batch).logits.argmax(-1).roll(1, dims=1)[answered].sum().item())
    found = found_in(two_processes(EVALUATE, miniature, tmp_path, cache=cache))
    assert found == {"eval_labels": labels, "eval_guesses": guesses} and len(set(labels)) == 5


# FSDP2: sharded over two processes, of which one has text alone; against the whole model with both batches.
SHARD = """
import conftest, sys, copy, torch, jina_vlm
import torch.distributed as dist
from PIL import Image
from processes import leave
from torch.distributed.fsdp import fully_shard
from jina_vlm_tools.training import JinaVLMCollator
from jina_vlm_tools.training.train import FSDP
from jina_vlm_tools.training.trainer import see_blank_images

folder, = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
whole = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train()
collator = JinaVLMCollator(jina_vlm.JinaVLMProcessor.from_pretrained(folder))
collator.processor.image_processor.max_tiles = 2
turns = [{"user": "which?", "assistant": "a red star"}]
image = Image.new("RGB", (200, 900), (90, 9, 9))
batches = [collator([{"images": [image], "texts": turns}]), collator([{"texts": turns * 3}])]
items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)

sharded = copy.deepcopy(whole)
for model in (whole, sharded):
    see_blank_images(model)
for module in sharded.modules():
    if type(module).__name__ in FSDP["transformer_layer_cls_to_wrap"]:
        fully_shard(module)
fully_shard(sharded)
losses = []
for model, mine in ((whole, batches), (sharded, [batches[rank]])):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        loss = sum(model(**batch, num_items_in_batch=items).loss for batch in mine)
        scale = dist.get_world_size() if model is sharded else 1  # gradients are averaged over processes
        (loss * scale).backward()
        if model is sharded:
            dist.all_reduce(loss := loss.detach())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
expected = whole.state_dict()
furthest = max(
    (expected[name] - tensor.full_tensor()).abs().max().item() for name, tensor in sharded.state_dict().items()
)
local = sum(parameter.to_local().numel() for parameter in sharded.parameters())
share = local / whole.num_parameters()
leave({"whole": losses[:3], "sharded": losses[3:], "furthest": furthest, "share": share})
"""


@pytest.mark.parametrize(
    ("precision", "has_it", "told"), [("bf16", False, True), ("fp32", False, False), ("bf16", True, False)]
)
def test_a_cpu_without_bfloat16_is_told_of(precision, has_it, told, write, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(command, "cpu_multiplies_in_bf16", lambda: has_it)
    stage, _ = read_stage(write(precision=precision))
    assert command.training_arguments(stage, tmp_path, 1).bf16 == (precision == "bf16")
    assert ("set `precision: fp32`" in caplog.text) == told


@pytest.mark.parametrize(
    ("found", "has_it"), [({"avx2": True}, False), ({"avx512_bf16": True}, True), ({"neon": True, "bf16": True}, True)]
)
def test_instructions_for_bfloat16(found, has_it, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert cpu_multiplies_in_bf16() == has_it
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert cpu_multiplies_in_bf16()


def test_fsdp2_through_the_trainer(write, tmp_path, monkeypatch):
    """What it is told, since it shards on GPUs alone; elsewhere the command says so."""
    stage, _ = read_stage(write(fsdp=True))
    plugin = command.training_arguments(stage, tmp_path, 1).fsdp_plugin_args
    assert plugin["fsdp_version"] == 2 and plugin["reshard_after_forward"]
    assert plugin["transformer_cls_names_to_wrap"] == "SiglipEncoderLayer,Qwen3DecoderLayer"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="`fsdp` is True: accelerate shards on GPUs alone"):
        run(write(fsdp=True), "--output", tmp_path / "out")


def test_sharded_by_fsdp2(miniature, cache):
    found = found_in(two_processes(SHARD, miniature, cache=cache))
    assert found["sharded"] == pytest.approx(found["whole"], abs=1e-5) and found["furthest"] < 1e-5
    assert found["whole"][2] < found["whole"][0] and 0.45 < found["share"] < 0.55
