"""Work that is killed leaves the old or the new, never a half that loads: saving, downloading, converting. The bulk command's
own tests of this are in `test_answer_pictures.py`, the publisher's in `test_upload_to_hub.py`."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jina_vlm
import pytest
import torch
from conftest import ROOT
from hub_server import Fault, serve_hub
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText


def load(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder)


def values(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Killed(BaseException):
    """Stands for a kill at an exact point: nothing behind it runs, and no `except Exception` sees it."""


def test_saving_killed_at_every_step(model, bundle, tmp_path, monkeypatch):
    """Sharded over sharded, with the same names: what the library writes in place would load as a mixture."""
    old, new = values(model), {name: tensor + 1 for name, tensor in values(model).items()}
    model.save_pretrained(tmp_path / "old", max_shard_size="500KB")
    shards = len(list((tmp_path / "old").glob("*.safetensors")))
    assert shards > 2
    changed = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(tmp_path / "old")
    changed.load_state_dict(new)

    outcomes = []
    for step in range(200):
        folder = Path(shutil.copytree(tmp_path / "old", tmp_path / f"at-{step}"))
        count = 0

        def tick(function, step=step, folder=folder):
            def run(*args, **kwargs):
                nonlocal count
                count += 1
                if count > step:
                    # a copy as a kill would leave it: what is cleaned up by Python stays
                    shutil.copytree(folder, tmp_path / f"left-{step}", dirs_exist_ok=True)
                    raise Killed
                return function(*args, **kwargs)

            return run

        with monkeypatch.context() as patch:
            patch.setattr("transformers.modeling_utils.safe_save_file", tick(jina_vlm_safe_save()))
            patch.setattr(os, "replace", tick(os.replace))
            patch.setattr(Path, "unlink", tick(Path.unlink))
            try:
                changed.save_pretrained(folder, max_shard_size="500KB")
            except Killed:
                left = tmp_path / f"left-{step}"
            else:
                assert equal(values(load(folder)), new)
                break
        try:
            found = values(load(left))
        except (OSError, ValueError):
            outcomes.append("does not load")
        else:
            assert equal(found, old) or equal(found, new), f"a mixture at step {step}"
            outcomes.append("old" if equal(found, old) else "new")
        for folder in tmp_path.glob("*-[0-9]*"):
            shutil.rmtree(folder)
    assert outcomes[: shards + 1] == ["old"] * (shards + 1), "writing shards, and up to the first change, nothing is lost"
    assert len(outcomes) > 2 * shards


def jina_vlm_safe_save():
    from transformers import modeling_utils

    return modeling_utils.safe_save_file


SAVE = """
import sys
sys.path.insert(0, sys.argv[3])
import conftest, jina_vlm, torch
model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(sys.argv[1])
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(1)
print("saving", flush=True)
while True:
    model.save_pretrained(sys.argv[2], max_shard_size="200KB")
"""


def run_and_kill(code: str, *args, after: float, **environment) -> None:
    """Runs code in a fresh process and kills it so many seconds after its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args), str(ROOT / "tests")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    try:
        assert process.stdout.readline().strip() == b"saving"
        time.sleep(after)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("after", [0.05, pytest.param(0.2, marks=pytest.mark.slow), pytest.param(0.5, marks=pytest.mark.slow)])
def test_saving_killed_for_real(model, tmp_path, after):
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder, max_shard_size="200KB")
    old, new = values(model), {name: tensor + 1 for name, tensor in values(model).items()}
    run_and_kill(SAVE, folder, folder, after=after)
    try:
        found = values(load(folder))
    except (OSError, ValueError):
        return  # among the renames
    assert equal(found, old) or equal(found, new)


def test_saving_again_leaves_no_other_shards(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert not [name for name in names if "-of-" in name or name.endswith("index.json") or name.startswith(".saving")]
    assert {"model.safetensors", "config.json", "modeling_jina_vlm.py", "notes.txt"} <= names
    assert equal(values(load(tmp_path)), values(model))
    before = load_file(tmp_path / "model.safetensors")
    load(tmp_path).save_pretrained(tmp_path)  # into the folder that its weights are mapped from
    assert equal(load_file(tmp_path / "model.safetensors"), before)


def test_a_failed_save_leaves_the_old(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


CONVERT = """
import sys
sys.path.insert(0, sys.argv[3])
import conftest, jina_vlm
model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(sys.argv[1])
print("saving", flush=True)
model.save_pretrained(sys.argv[2], max_shard_size="50KB")
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.01, 0.03])
def test_converting_killed(released_folder, model, tmp_path, after):
    """From the released layout into a new folder."""
    run_and_kill(CONVERT, released_folder, tmp_path / "new", after=after)
    try:
        found = values(load(tmp_path / "new"))
    except (OSError, ValueError):
        return
    assert equal(found, values(model))


DOWNLOAD = """
import sys
sys.path.insert(0, sys.argv[2])
import conftest, jina_vlm
print("saving", flush=True)
model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(sys.argv[1])
print(sum(parameter.double().sum().item() for parameter in model.parameters()))
"""


@pytest.mark.slow
def test_downloading_from_a_server_that_drops_connections(bundle, model, tmp_path):
    """The library's client goes on where it was cut, or the next call does; without the server a part does not load."""
    environment = {
        **os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1",
        "no_proxy": "127.0.0.1,localhost",
    }  # fmt: skip

    def attempt(**changes) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", DOWNLOAD, "me/model", str(ROOT / "tests")]
        return subprocess.run(command, env={**environment, **changes}, capture_output=True, text=True)

    with serve_hub({"token": "me"}) as hub:
        hub.put("me/model", bundle)
        environment["HF_ENDPOINT"] = hub.url
        hub.faults.append(Fault("GET", "/storage", cut_response=100_000, times=100))
        assert attempt().returncode != 0
        assert attempt(HF_HUB_OFFLINE="1").returncode != 0, "a part of the weights is no checkpoint"
        hub.faults.clear()
        hub.faults.append(Fault("GET", "/storage", cut_response=100_000, times=1))
        done = attempt()
    assert done.returncode == 0, done.stderr
    expected = sum(parameter.double().sum().item() for parameter in model.parameters())
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, rel=1e-12)
    assert attempt(HF_HUB_OFFLINE="1").returncode == 0
