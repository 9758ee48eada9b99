"""ms-swift's command, as a user runs it on the small checkpoint.

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
from rows import CHECKPOINT, ROOT, Row, make_rows


os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

HERE = Path(__file__).parent
PLUGIN = ROOT / "examples" / "ms_swift_plugin.py"


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> list[Row]:
    return make_rows(tmp_path_factory.mktemp("rows"))


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
