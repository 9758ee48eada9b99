"""Where benchmarks leave their figures, for `benchmarks.report`: results/<device>/<name>.json, with the machine and the command."""

import json
import platform
import sys
from pathlib import Path

import torch
import transformers


ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def machine(device: str = "cpu") -> dict[str, str | int]:
    """What a figure depends on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
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
    command = " ".join(["python -m", f"benchmarks.{name}", *sys.argv[1:]])
    written = {"command": command, "machine": machine(device), "rows": rows}
    file.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def load(name: str, device: str = "cpu") -> dict | None:
    """What [`save`] wrote, if it has."""
    file = RESULTS / device / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def markdown(head: list[str], rows: list[list[str]], figures: int = 1) -> str:
    """A table whose columns are figures from the one of number `figures` on."""
    lines = [head, [*["---"] * figures, *["---:"] * (len(head) - figures)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
