"""Where benchmarks leave figures, machine and command for `benchmarks.report`: results/<device>/<name>.json."""

import argparse
import json
import platform
import shlex
import sys
from pathlib import Path

import torch
import transformers


RESULTS = Path(__file__).parent / "results"


def arguments(description: str, rounds: int) -> argparse.ArgumentParser:
    """What benchmarks that compare times take."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="of each case in turn (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser


def machine(device: str = "cpu") -> dict[str, str | int]:
    """What a figure depends on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    described = {
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return described | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def save(name: str, rows: list[dict], device: str = "cpu") -> None:
    """Writes the rows of a benchmark, in the place of older ones."""
    file = RESULTS / device / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    written = {"command": _command(name, sys.argv[1:]), "machine": machine(device), "rows": rows}
    file.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def _command(name: str, options: list[str]) -> str:
    """As it can be run elsewhere: without where files lay for a while on this machine."""
    if "--folder" in options:
        place = options.index("--folder")
        options = options[:place] + options[place + 2 :]
    return shlex.join(["python", "-m", f"benchmarks.{name}", *options])


def load(name: str, device: str = "cpu") -> dict | None:
    """What [`save`] wrote, if it has."""
    file = RESULTS / device / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
