"""What the tests of other trainers share: rows, the small checkpoint, and ms-swift's command as a user runs it.

What the command hands to the model is compared with our processor, our collator and our forward pass.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from PIL import Image

from jina_vlm_tools.synthetic.questions import evaluation_sample
from jina_vlm_tools.synthetic.shapes import draw_scene


os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CHECKPOINT = ROOT / "checkpoints" / "tiny"
PLUGIN = ROOT / "examples" / "ms_swift_plugin.py"
SIZES = ((280, 280), (520, 300), (300, 700), (280, 280))  # one tile, two, three, one


@dataclass
class Row:
    """What ms-swift reads, and the same as messages for our processor."""

    given: dict
    chat: list[dict]


def draw(folder: Path, seed: int) -> tuple[Path, str, str]:
    """An image, partly transparent, which only our own way to open images puts on white; a question, the answer."""
    sample = evaluation_sample(seed, "count", "en")
    image = draw_scene(sample.scene).resize(SIZES[seed]).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 40, 40))
    path = folder / f"{seed}.png"
    image.save(path)
    return path, sample.turn.question, sample.turn.answer


def say(role: str, text: str, *images: Path) -> tuple[dict, dict]:
    """A message for ms-swift, and for our processor."""
    parts = [*({"type": "image", "image": str(image)} for image in images), {"type": "text", "text": text}]
    return {"role": role, "content": "<image>" * len(images) + text}, {"role": role, "content": parts}


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> list[Row]:
    """Images of different numbers of tiles, two images, text alone with typed control tokens, and several turns."""
    folder = tmp_path_factory.mktemp("rows")
    made = []
    for seed in range(len(SIZES)):
        path, question, answer = draw(folder, seed)
        images = [path]
        if seed == 3:
            images.append(folder / "turned.png")
            Image.open(path).rotate(90).save(images[-1])
        made.append((images, answer, [say("user", question, *images), say("assistant", answer)]))
    made.append(
        (
            [],
            "green",
            [say("user", "What does <|image|> <image> mean, <|endoftext|>?"), say("assistant", "green")],
        )
    )
    first = made[0][0]
    turns = [say("system", "Be brief."), say("user", "Hello"), say("assistant", "yes")]
    made.append((first, "two", [*turns, say("user", "How many?", *first), say("assistant", "two")]))
    return [
        Row(
            {"messages": [ours for ours, _ in turns], "images": list(map(str, images)), "solution": answer},
            [message for _, message in turns],
        )
        for images, answer, turns in made
    ]


@dataclass
class Run:
    """What the command wrote."""

    output: Path
    records: list[dict]
    log: list[dict]

    @property
    def checkpoint(self) -> Path:
        (folder,) = self.output.glob("checkpoint-*")
        return folder


@pytest.fixture(scope="session")
def swift(rows, tmp_path_factory):
    """`swift VERB --model checkpoints/tiny ... ARGUMENTS`, on the rows."""

    def run(verb: str, *arguments: str) -> Run:
        folder = tmp_path_factory.mktemp(verb)
        data, output, record = folder / "rows.jsonl", folder / "output", folder / "record"
        data.write_text("".join(json.dumps(row.given) + "\n" for row in rows), encoding="utf-8")
        record.mkdir()
        command = [
            str(Path(sys.executable).with_name("swift")), verb, "--model", str(CHECKPOINT),
            "--external_plugins", str(PLUGIN), str(HERE / "recorder.py"), "--dataset", str(data),
            "--output_dir", str(output), "--add_version", "false", "--torch_dtype", "float32", "--strict", "true",
            "--split_dataset_ratio", "0", "--report_to", "none", "--dataloader_num_workers", "0",
            "--logging_steps", "1", *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "RECORD": str(record), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        log = [json.loads(line) for line in (output / "logging.jsonl").read_text(encoding="utf-8").splitlines()]
        return Run(output, [torch.load(file) for file in sorted(record.iterdir())], log)

    return run


@pytest.fixture(scope="session")
def processor() -> JinaVLMProcessor:
    return JinaVLMProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="session")
def model() -> JinaVLMForConditionalGeneration:
    return JinaVLMForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
