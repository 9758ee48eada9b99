"""Loading time and memory beside the library's Qwen3, and time to a first token: `python -m benchmarks.loading`.

Random checkpoints in bfloat16 of 2.4B parameters, in this project's layout and in the released one, and of the
library's Qwen3 of 1.7B, are written to a temporary folder (14 GB) and loaded in turns, each time in a fresh process,
from the file cache. Memory is anonymous memory: what is mapped from a file can be given up at any time.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from jina_vlm_tools import markdown
from jina_vlm_tools.files import ROOT

from .results import save
from .side_by_side import Peak, in_fresh_process


SHARD_BYTES = 1_500_000_000
OURS, RELEASED, LIBRARY = "jina-vlm, this layout", "jina-vlm, released layout", "the library's Qwen3-1.7B"
IMPORTS = {
    "jina_vlm": "from jina_vlm import JinaVLMForConditionalGeneration",
    "the library's parts": "from transformers import Qwen3ForCausalLM, SiglipModel",
}


def released_config() -> dict:
    """The released checkpoint's config: the small golden one's keys with the 2.4B model's sizes."""
    config = json.loads((ROOT / "tests" / "golden" / "released-tiny" / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    vision.update(hidden_size=1152, output_size=2048)
    vision["block_config"]["attn_config"].update(n_heads=16, head_dim=72)
    vision["block_config"]["ffn_config"].update(size=4304)
    vision["vl_connector_config"]["attn_pooling_config"].update(n_heads=16, head_dim=72)
    vision["vl_connector_config"]["mlp_projector_config"].update(size=6144)
    text.update(hidden_size=2048, n_layers=28, num_hidden_layers=28, num_key_value_heads=8, head_dim=128)
    text.update(vocab_size=151936, embedding_size=151936)
    text["block_config"]["attn_config"].update(n_heads=16, n_kv_heads=8, head_dim=128)
    text["block_config"]["ffn_config"].update(size=6144)
    config.update(bos_token_id=151643, eos_token_id=151643, pad_token_id=151643, dtype="bfloat16")
    return config


def released_shapes() -> dict[str, list[int]]:
    """Names and shapes of the released checkpoint's tensors."""
    shapes = {
        "patch_embed.proj.weight": [1152, 588],
        "patch_embed.proj.bias": [1152],
        "pos_embed": [729, 1152],
        "post_lnorm.weight": [1152],
        "post_lnorm.bias": [1152],
        "vl_connector.pad_embed": [2, 2304],
        "vl_connector.pooling.q_w.weight": [1152, 2304],
        "vl_connector.pooling.kv_w.weight": [2304, 2304],
        "vl_connector.pooling.out.weight": [1152, 1152],
        "vl_connector.pooling.out.bias": [1152],
        "vl_connector.projector.up.weight": [12288, 1152],
        "vl_connector.projector.down.weight": [2048, 6144],
        **{f"vl_connector.pooling.{letter}_b": [1152] for letter in "qkv"},
    }
    for layer in range(27):
        block = {"attn.qkv_w.weight": [3456, 1152], "attn.out.weight": [1152, 1152], "attn.out.bias": [1152]}
        block |= {f"attn.{letter}_b": [1152] for letter in "qkv"}
        block |= {f"{norm}.{part}": [1152] for norm in ("attn_lnorm", "ffn_lnorm") for part in ("weight", "bias")}
        block |= {"ffn.up.weight": [4304, 1152], "ffn.up.bias": [4304]}
        block |= {"ffn.down.weight": [1152, 4304], "ffn.down.bias": [1152]}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes = {f"model.vision_model.{name}": shape for name, shape in shapes.items()}
    text = {"embedding.embedding": [151936, 2048], "embedding.new_embedding": [128, 2048], "ln_f.weight": [2048]}
    for layer in range(28):
        block = {
            "attn.qkv_w.weight": [4096, 2048],
            "attn.out.weight": [2048, 2048],
            "attn.q_lnorm.weight": [128],
            "attn.k_lnorm.weight": [128],
            "ffn.up.weight": [12288, 2048],
            "ffn.down.weight": [2048, 6144],
            "attn_lnorm.weight": [2048],
            "ffn_lnorm.weight": [2048],
            "attn.q_b": [2048],
            "attn.k_b": [1024],
            "attn.v_b": [1024],
        }
        text |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    return (
        shapes | {f"model.language_model.{name}": s for name, s in text.items()} | {"lm_head.weight": [151936, 2048]}
    )


def write_released(folder: Path) -> None:
    """A random 2.4B checkpoint in the released layout, bfloat16, in shards."""
    (folder / "config.json").write_text(json.dumps(released_config()))
    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shards, shard, size = [], {}, 0

    def close_shard():
        file = f"model-{len(shards) + 1:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        shards.append((file, list(shard)))
        shard.clear()

    for name, shape in released_shapes().items():
        count = torch.Size(shape).numel()
        zero = ".language_model.layers" in name and name.endswith(("q_b", "k_b", "v_b"))
        values = torch.zeros(count, dtype=torch.bfloat16) if zero else noise.repeat(-(-count // len(noise)))[:count]
        shard[name] = values.view(shape).clone()
        size += 2 * count
        if size > SHARD_BYTES:
            close_shard()
            size = 0
    close_shard()
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def load(folder: str, library: bool) -> dict[str, float]:
    """Seconds, bytes of weights, and how far anonymous memory rose while a checkpoint was loaded."""
    if library:
        from transformers import Qwen3ForCausalLM as model_class
    else:
        from jina_vlm import JinaVLMForConditionalGeneration as model_class
    with Peak() as peak:
        start = time.perf_counter()
        model = model_class.from_pretrained(folder, dtype="auto")
        seconds = time.perf_counter() - start
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {"seconds": seconds, "weights": weights, "peak": peak.bytes}


def write_all(folder: Path) -> dict[str, Path]:
    from . import full_model

    paths = {OURS: folder / "ours", RELEASED: folder / "released", LIBRARY: folder / "library"}
    paths[RELEASED].mkdir()
    write_released(paths[RELEASED])
    model = full_model.jina_vlm()
    model.save_pretrained(paths[OURS], max_shard_size=SHARD_BYTES)
    full_model.text_model(model).save_pretrained(paths[LIBRARY], max_shard_size=SHARD_BYTES)
    return paths


def seconds_of(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def first_token() -> tuple[float, float]:
    """Seconds that demo.py says until the first token of its answer, and from its start to its end."""
    start = time.perf_counter()
    said = subprocess.run(
        [sys.executable, "-m", "jina_vlm_tools", "demo"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return float(re.search(r"First token after ([\d.]+) s", said)[1]), time.perf_counter() - start


def table(rows: list[dict]) -> str:
    head = ["Loaded", "Weights, GB", "Seconds", "Seconds a GB, to the library's", "Peak anonymous memory / weights"]
    loaded = [row for row in rows if "weights" in row]
    library = next(row for row in loaded if row["what"] == LIBRARY)
    lines = [
        [
            row["what"],
            f"{row['weights'] / 1e9:.2f}",
            f"{row['seconds']:.1f}",
            f"**{row['seconds'] / row['weights'] / (library['seconds'] / library['weights']):.2f}**",
            f"{row['peak'] / row['weights']:.2f}",
        ]
        for row in loaded
    ]
    others = [f"{row['what']}: {row['seconds']:.1f} s." for row in rows if "weights" not in row]
    return "\n".join([markdown.table(head, lines), "", *others])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where to write the checkpoints (14 GB); a temporary folder if left out"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        paths = write_all(Path(folder))
        runs = {name: [] for name in paths}
        for _ in range(args.rounds):
            for name, path in paths.items():
                runs[name].append(in_fresh_process(load, str(path), name == LIBRARY))
    rows = [
        {"what": name, **{key: statistics.median(run[key] for run in of) for key in of[0]}}
        for name, of in runs.items()
    ]
    for name, code in IMPORTS.items():
        rows.append(
            {
                "what": f"import of {name}",
                "seconds": statistics.median(seconds_of("-c", code) for _ in range(args.rounds)),
            }
        )
    demos = [first_token() for _ in range(args.rounds)]
    rows.append(
        {
            "what": "make demo, from the question to its first token",
            "seconds": statistics.median(first for first, _ in demos),
        }
    )
    rows.append(
        {"what": "make demo, from its start to its end", "seconds": statistics.median(whole for _, whole in demos)}
    )
    print(table(rows))
    save("loading", rows)


if __name__ == "__main__":
    main()
