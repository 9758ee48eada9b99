"""A stage of reinforcement learning, from YAML: trained, asked, stopped and gone on with."""

import json
import random
import shutil

import datasets
import jina_vlm
import pytest
import yaml
from conftest import make_image
from miniature import save_miniature
from PIL import Image
from safetensors.torch import load_file
from stages import history, run, write_stage

from jina_vlm_tools.synthetic.questions import Turn
from jina_vlm_tools.synthetic.writing import write_questions, write_texts
from jina_vlm_tools.training.settings import SettingsError
from jina_vlm_tools.training.stages import PartSettings, read_stage
from jina_vlm_tools.training.trainer import cosine, part_of


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("TENSORBOARD_LOGGING_DIR", "")  # the command sets it; so it is taken back
        yield


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    return save_miniature(tmp_path_factory.mktemp("miniature"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Questions about images of one and of two tiles, and about none."""
    folder, rng = tmp_path_factory.mktemp("grpo"), random.Random(0)
    turns = [Turn("count", "en", f"how many {index}?", str(index % 5)) for index in range(12)]
    images = [Image.fromarray(make_image(200, rng.choice((200, 900)))) for _ in turns]
    write_questions(folder / "images.parquet", zip(images, turns, strict=True))
    write_texts(folder / "text.jsonl", ([turn] for turn in turns))
    (folder / "documents.jsonl").write_text(json.dumps({"text": "nobody asked"}) + "\n")
    common = {"task": "counting", "domain": "none", "language": "en"}
    sources = [
        {"name": "images", "path": "images.parquet", "weight": 0.75, "modality": "image-text", **common},
        {"name": "text", "path": "text.jsonl", "weight": 0.25, "modality": "text", **common},
    ]
    (folder / "mixture.yaml").write_text(yaml.safe_dump({"sources": sources}))
    return folder


GRPO = {
    "rewards": [{"name": "letters", "weight": 2.0}, {"name": "pattern", "pattern": "[a-m].*", "weight": 0.5}],
    "answers": 4,
    "max_new_tokens": 4,
    "kl": 0.1,
}
STAGE = {
    "mixture": "mixture.yaml",
    "steps": 4,
    "global_batch_size": 8,
    "batch_size": 4,
    "max_tiles": 2,
    "precision": "fp32",
    "gradient_checkpointing": False,
    "lora": {"rank": 2, "alpha": 4, "parts": ["connector", "decoder"]},
    "grpo": GRPO,
    "encoder": {"learning_rate": 0.0},
    "connector": {"learning_rate": 1e-3, "warmup_steps": 1},
    "decoder": {"learning_rate": 5e-4},
    "log_every": 1,
    "save_every": 2,
    "evaluation": {"path": "images.parquet", "every": 4, "samples": 3, "max_new_tokens": 4},
}


@pytest.fixture(scope="module")
def write(folder, miniature):
    def write(**changes):
        return write_stage(folder / "stage.yaml", {**STAGE, "model": str(miniature), **changes})

    return write


@pytest.fixture(scope="module")
def trained(write, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    run(write(), "--output", output)
    return output


def test_rewards_are_weighed(trained):
    rewards, letters, pattern = (
        history(trained, key) for key in ("reward", "rewards/letters/mean", "rewards/pattern/mean")
    )
    assert len(rewards) == 4 and any(pattern)
    assert rewards == pytest.approx([2 * one + 0.5 * other for one, other in zip(letters, pattern, strict=True)])


def test_answers_that_rewards_cannot_compare_with(write, folder, tmp_path):
    """They are bad samples, known before a model is built."""
    mixture = yaml.safe_load((folder / "mixture.yaml").read_text())
    rows = [
        ("how many?", "three"),
        ("how many?", " "),
        ("how many?", [{"type": "image"}, {"type": "text", "text": "3"}]),
    ]
    Image.new("RGB", (20, 20)).save(folder / "small.png")
    with open(folder / "odd.jsonl", "w") as file:
        for question, answer in rows:
            content = answer if isinstance(answer, list) else [{"type": "text", "text": answer}]
            asked = {"role": "user", "content": [{"type": "text", "text": question}]}
            earlier = {"role": "assistant", "content": [{"type": "text", "text": "3"}]}
            messages = [asked, earlier, asked, {"role": "assistant", "content": content}]
            images = ["small.png"] if isinstance(answer, list) else []
            file.write(json.dumps({"messages": messages, "images": images}) + "\n")
    mixture["sources"] = [{**mixture["sources"][0], "path": "odd.jsonl", "weight": 1.0}]
    (folder / "odd.yaml").write_text(yaml.safe_dump(mixture))
    with pytest.raises(SystemExit) as error:
        run(write(mixture="odd.yaml", grpo={**GRPO, "rewards": [{"name": "number"}]}), "--output", tmp_path)
    for problem in ("3 of 3 samples are bad", "'three'", "''", "Its answer has an image"):
        assert problem in str(error.value)


def test_adapters_are_trained_and_saved(trained, miniature):
    """Each part at its own rate. What the trainer wants of the processor is not saved with it."""
    weights = load_file(trained / "adapter_model.safetensors")
    assert {part_of(name) for name in weights} == {"connector", "decoder"}
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    rates = [5e-4 * cosine(step, PartSettings(5e-4), 4) for step in range(1, 5)]
    assert history(trained, "learning_rate_decoder") == pytest.approx(rates)
    jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(miniature).load_adapter(str(trained))
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(trained)
    assert processor.return_tile_positions and not processor.tiles_by_sample


def test_it_is_asked_and_drawn(trained):
    assert len(history(trained, "eval_accuracy")) == 2
    assert history(trained, "kl")[0] == pytest.approx(0, abs=1e-6) and all(history(trained, "entropy"))
    with Image.open(trained / "run" / "curves.png") as curves:
        assert curves.width == 6 * 5 * 120  # reward, KL, entropy, loss, accuracy, learning rates


def test_a_run_goes_on_to_the_same_rewards(trained, write, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    run(write(), "--output", tmp_path, "--resume")
    for key in ("reward", "loss", "kl"):
        assert history(tmp_path, key) == history(trained, key)


def test_a_plan_counts_questions(write, capsys, tmp_path):
    run(write(), "--output", tmp_path, "--plan-only")
    assert "images: 0 of 12 samples are bad" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": 1}, "`grpo.answers` is 1: expected 2 or more"),
        ({"answers": 3}, "`global_batch_size` is 8: expected a multiple of `grpo.answers` .3."),
        ({"max_new_tokens": 0}, "`grpo.max_new_tokens` is 0: expected 1 or more"),
        ({"temperature": 0}, "`grpo.temperature` is 0.0: expected a number above 0"),
        ({"kl": -1}, "`grpo.kl` is -1.0: expected 0 or more"),
        ({"rewards": []}, r"`grpo.rewards` is \[\]: expected at least one"),
        ({"rewards": [{"name": "best"}]}, r"`grpo.rewards\[0\].name` is 'best': expected one of exact, number"),
        ({"rewards": [{"name": "exact"}] * 2}, "`grpo.rewards` is .*: expected each reward once"),
        ({"rewards": [{"name": "pattern"}]}, r"`grpo.rewards\[0\].pattern` is None: expected a text for the reward"),
        ({"rewards": [{"name": "exact", "pattern": "a"}]}, r"`grpo.rewards\[0\].pattern` is 'a': .* for no other"),
        (
            {"rewards": [{"name": "exact", "weight": 0}]},
            r"`grpo.rewards\[0\].weight` is 0.0: expected a number above 0",
        ),
        ({"rewards": [{"name": "pattern", "pattern": ""}]}, r"`grpo.rewards\[0\].pattern` is '': it matches silence"),
        ({"rewards": [{"name": "pattern", "pattern": "("}]}, r"pattern` is '\(': it is no regular expression"),
    ],
)
def test_stages_that_cannot_be(write, changes, message):
    with pytest.raises(SettingsError, match=message):
        read_stage(write(grpo={**GRPO, **changes}))


def test_sources_that_cannot_be(write, folder, tmp_path):
    mixture = yaml.safe_load((folder / "mixture.yaml").read_text())
    mixture["sources"][0]["streaming"] = True
    (folder / "streamed.yaml").write_text(yaml.safe_dump(mixture))
    with pytest.raises(SettingsError, match=r"`sources\[0\].streaming` is True: with `grpo` each question is read"):
        read_stage(write(mixture="streamed.yaml"))
    mixture["sources"] = [{**mixture["sources"][1], "path": "documents.jsonl", "weight": 1.0}]
    (folder / "unasked.yaml").write_text(yaml.safe_dump(mixture))
    with pytest.raises(SystemExit, match="1 x It does not end in a question and its answer"):
        run(write(mixture="unasked.yaml"), "--output", tmp_path)
