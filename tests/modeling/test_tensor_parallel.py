"""Tensor parallelism: two processes, each with half of the heads and of the inner widths, give what one process
gives."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from processes import found_in


# What each process runs, under torchrun.
CODE = """
import sys
import torch
import jina_vlm
from conftest import make_conversation
from processes import leave
from jina_vlm_tools.synthetic.questions import evaluation_sample
from jina_vlm_tools.synthetic.shapes import draw_scene

try:
    from transformers.distributed import DistributedConfig
    parallel = {"distributed_config": DistributedConfig(tp_plan="auto")}
except (ImportError, TypeError):
    parallel = {"tp_plan": "auto"}

bundle, tiny, released = sys.argv[1:]


def load(folder, dtype, **kwargs):
    return jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(folder, dtype=dtype, **kwargs).eval()


def compare(folder, dtype, turns):
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        make_conversation(turns), tokenize=True, return_dict=True, return_tensors="pt", padding=True,
        add_generation_prompt=True,
    )
    results = []
    for kwargs in (parallel, {}):
        model = load(folder, dtype, **kwargs)
        with torch.no_grad():
            logits = model(**inputs).logits
        logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        local = {
            name: list((p.to_local() if hasattr(p, "to_local") else p).shape) for name, p in model.named_parameters()
        }
        results.append((logits, ids, local))
    (ours, ids, local), (theirs, expected_ids, whole) = results
    difference = (ours - theirs)[inputs["attention_mask"].bool()].abs().max().item()
    last = (ours - theirs)[:, -1].abs().max().item()
    return {"all": difference, "last": last, "ids": torch.equal(ids, expected_ids), "local": local, "whole": whole}


def shapes(seed, *size):
    return {"type": "image", "image": draw_scene(evaluation_sample(seed, "count", "en").scene).resize(size)}


texture = [[("user", (113, 500), "What is shown?")], [("user", (20, 20), "the quick", (30, 90), "fox")]]
drawn = [
    [("user", shapes(1, 378, 378), "Describe the picture.")],
    [("user", shapes(2, 640, 480), "How many shapes are there?")],
]
found = {"float64": compare(bundle, torch.float64, texture), "float32": compare(tiny, torch.float32, drawn)}
try:
    load(released, torch.float32, **parallel)
    found["released"] = "loaded"
except ValueError as error:
    found["released"] = str(error)
leave(found)
"""


@pytest.fixture(scope="module")
def found(bundle, released_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "jina_vlm").symlink_to(ROOT)
    script = folder / "script.py"
    script.write_text(CODE)
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "helpers")])
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    result = subprocess.run(
        [*command, str(bundle), str(ROOT / "checkpoints" / "tiny"), str(released_folder)],
        capture_output=True, text=True, env=environment, cwd=folder,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return found_in(result.stdout)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_two_processes_give_what_one_gives(found, precision):
    """In float32 at the last position, where the next token comes from; in float64, where rounding plays no part, at
    all."""
    assert found[precision]["last"] < 1e-4
    assert found["float64"]["all"] < 1e-9
    assert found[precision]["ids"], "greedy continuations"


@pytest.mark.parametrize(
    "part",
    [
        "vision_model.tower.encoder.layers.0.self_attn",
        "vision_model.tower.encoder.layers.0.mlp",
        "connector",
        "language_model.layers.0",
    ],
)
def test_each_process_holds_half(found, part):
    local, whole = found["float64"]["local"], found["float64"]["whole"]
    names = [
        name
        for name in whole
        if name.startswith(f"model.{part}.") and len(whole[name]) == 2 and "pad_embed" not in name
    ]
    assert names
    for name in names:
        assert 2 * local[name][0] * local[name][1] == whole[name][0] * whole[name][1], name


def test_released_layout_says_what_to_do(found):
    assert "save_pretrained" in found["released"]
