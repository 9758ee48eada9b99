"""A folder holds what it should and nothing else, and answers in a fresh process."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from jina_vlm_tools.files import ROOT

from . import PublishingError


MODULES = tuple(sorted(path.name for path in ROOT.glob("*_jina_vlm.py")))
SETTINGS = ("config.json", "generation_config.json", "processor_config.json")
TEXT = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
LICENSE, CARD = "CODE_LICENSE", "README.md"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def bundle_files() -> dict[str, bytes]:
    """The modules that a folder loaded with `trust_remote_code=True` needs, by file name."""
    return {name: (ROOT / name).read_bytes() for name in MODULES}


def check_shards(weights: str) -> None:
    """
    Raises:
        PublishingError: a folder's index names files of weights that are not there.
    """
    folder = Path(weights)
    if (folder / INDEX).is_file() and (
        missing := [name for name in weight_files(folder) if not (folder / name).is_file()]
    ):
        raise PublishingError(
            f"{weights} lacks {', '.join(missing)}, which its {INDEX} names. "
            "Fetch the missing ones again, or name the whole checkpoint."
        )


def weight_files(folder: Path) -> list[str]:
    """Names of the files of weights, with the index of shards where there is one."""
    index = folder / INDEX
    return (
        [INDEX, *sorted(set(json.loads(index.read_text())["weight_map"].values()))] if index.is_file() else [WEIGHTS]
    )


def list_bundle(folder: Path, with_card: bool = True) -> list[str]:
    """
    The names of a bundle's files, which are all that the folder holds. One that is not for the Hub has no card.

    Raises:
        PublishingError: a file is missing, holds other code than this repository, or does not belong there.
    """
    modules = bundle_files()
    names = [*modules, *SETTINGS, *TEXT, LICENSE, *[CARD] * with_card, *weight_files(folder)]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise PublishingError(f"{folder} lacks {', '.join(missing)}: it is no whole bundle. Assemble it again.")
    if others := sorted({path.name for path in folder.iterdir()} - set(names)):
        raise PublishingError(f"{folder} holds {', '.join(others)}, which belongs to no bundle.")
    if changed := [name for name, content in modules.items() if (folder / name).read_bytes() != content]:
        raise PublishingError(
            f"{', '.join(changed)} in {folder} differs from {ROOT}: another `jina_vlm` is installed. "
            f"Install this one: `pip install -e {ROOT}`."
        )
    return sorted(names)


def run_alone(script: str, folder: Path, *others: Path) -> dict:
    """
    What a script of this package prints, as JSON in its last line, about a folder: in a fresh process, offline, with
    the folder's own code alone.

    Raises:
        PublishingError: it fails.
    """
    with tempfile.TemporaryDirectory() as home:
        # None of the variables by which tokens, caches and other code would come along.
        kept = {
            name: os.environ[name]
            for name in ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "TMPDIR")
            if name in os.environ
        }
        process = subprocess.run(
            [
                sys.executable,
                "-I",
                str(Path(__file__).with_name(script)),
                *(str(p.resolve()) for p in (folder, *others)),
            ],
            capture_output=True,
            text=True,
            cwd=home,
            env={**kept, "HOME": home, "HF_HOME": home, "HF_HUB_OFFLINE": "1"},
        )
    if process.returncode:
        raise PublishingError(f"{folder} does not load by itself. It said:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def ask(folder: Path) -> str:
    """
    The answer that the folder gives to a drawn image: in a fresh process, offline, with its own code alone.

    Raises:
        PublishingError: it does not load, lacks weights, computes what is no number, or says nothing.
    """
    result = run_alone("answer_once.py", folder)
    faults = [f"{name}: {', '.join(keys[:5])}" for name, keys in result["faults"].items()]
    if not result["logits_are_finite"]:
        faults.append("logits that are no finite numbers")
    if not result["answer"]:
        faults.append("an empty answer")
    if result["code"] != ["transformers_modules"]:
        faults.append(f"code that the folder did not bring ({', '.join(result['code'])})")
    if faults:
        raise PublishingError(f"{folder} loads, but with {'; '.join(faults)}.")
    return result["answer"]
