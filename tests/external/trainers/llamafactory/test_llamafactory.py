"""LLaMA-Factory with `examples/llamafactory_plugin.py`, its check of versions switched off: what reaches the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from rows import CHECKPOINT, ROOT, make_rows

from jina_vlm_tools.training import JinaVLMCollator
from jina_vlm_tools.training.trainer import part_of


HERE = Path(__file__).parent
PLUGIN = ROOT / "examples" / "llamafactory_plugin.py"
TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(rows, batches that reached the model, the log, the adapter's folder): two steps of all rows."""
    folder = tmp_path_factory.mktemp("llamafactory")
    rows = make_rows(folder)
    # It computes in the dtype that a checkpoint names.
    model = folder / "model"
    JinaVLMForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).save_pretrained(model)
    JinaVLMProcessor.from_pretrained(CHECKPOINT).save_pretrained(model)
    data, record, output = folder / "data", folder / "record", folder / "adapter"
    data.mkdir()
    record.mkdir()
    columns = {"messages": "messages", "images": "images"}
    described = {"rows": {"file_name": "rows.json", "formatting": "sharegpt", "columns": columns, "tags": TAGS}}
    (data / "rows.json").write_text(json.dumps([row.given for row in rows]), encoding="utf-8")
    (data / "dataset_info.json").write_text(json.dumps(described), encoding="utf-8")
    settings = {
        "model_name_or_path": str(model), "stage": "sft", "do_train": True, "template": "jina_vlm",
        "finetuning_type": "lora", "lora_target": "all", "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False, "dataset_dir": str(data), "dataset": "rows", "cutoff_len": 4096,
        "output_dir": str(output), "max_steps": 2, "per_device_train_batch_size": len(rows), "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": "none", "dataloader_num_workers": 0,
        "disable_gradient_checkpointing": True,  # its own fails on transformers 5.24
    }  # fmt: skip
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    environment = {
        **os.environ, "DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "RECORD": str(record),
        "PYTHONPATH": str(HERE / "stubs"), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, str(HERE / "recorder.py"), str(PLUGIN), "train", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    log = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return rows, [torch.load(path) for path in sorted(record.iterdir())], log, output


@pytest.fixture(scope="module")
def processor():
    return JinaVLMProcessor.from_pretrained(CHECKPOINT)


def test_it_hands_over_what_our_collator_makes(run, processor):
    """But for one thing: between turns it does not teach that an answer ends."""
    rows, batches, log, _ = run
    collator = JinaVLMCollator(processor)
    row_of = {tuple(collator([{"messages": row.chat}])["input_ids"][0].tolist()): row for row in rows}
    assert len(batches) == 2
    for given in batches:
        whole = [
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True)
        ]
        assert set(whole) == set(row_of)
        expected = collator([{"messages": row_of[ids].chat} for ids in whole])
        length = expected["input_ids"].shape[1]  # it pads to a multiple of 8
        not_in_text = (expected["labels"] != -100) & (expected["labels"] != expected["input_ids"])
        assert not_in_text.sum() == 1
        expected["labels"][not_in_text] = -100
        for name in ("attention_mask", "labels"):
            assert torch.equal(given[name][:, :length], expected[name])
        assert not given["attention_mask"][:, length:].any()
        for name in ("pixel_values", "tile_positions"):
            assert torch.equal(given[name], expected[name])
    model = JinaVLMForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    with torch.no_grad():
        assert log[0]["loss"] == pytest.approx(model(**expected).loss.item(), abs=1e-5)


def test_adapter_loads(run):
    model = JinaVLMForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    model.load_adapter(str(run[3]))
    adapters = {name: tensor for name, tensor in model.named_parameters() if "lora_" in name}
    assert {part_of(name) for name in adapters} == {"encoder", "connector", "decoder"}
    assert all(tensor.any() for tensor in adapters.values())
