"""Stages as YAML files, run by the command, and what their runs logged."""

import json
from pathlib import Path

import yaml

from jina_vlm_tools.cli.main import main


def write_stage(file: Path, stage: dict) -> Path:
    """Keys without a value are left out."""
    file.write_text(yaml.safe_dump({key: value for key, value in stage.items() if value is not None}))
    return file


def run(*args) -> None:
    main(["train", *map(str, args)])


def history(output: Path, key: str) -> list:
    """A key's values up to the run's last checkpoint."""
    last = max((output / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return [
        entry[key] for entry in json.loads((last / "trainer_state.json").read_text())["log_history"] if key in entry
    ]
