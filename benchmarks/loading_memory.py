"""Peak anonymous memory while a 2.4B checkpoint in the released layout loads, against the size of its weights.

Writes a random checkpoint (bf16, sharded) to a temporary folder, loads it in a fresh process, and samples RssAnon there.

    python -m benchmarks.loading_memory [--folder DIR]
"""

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file


ROOT = Path(__file__).parent.parent
SHARD_BYTES = 1_500_000_000


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
        "patch_embed.proj.weight": [1152, 588], "patch_embed.proj.bias": [1152], "pos_embed": [729, 1152],
        "post_lnorm.weight": [1152], "post_lnorm.bias": [1152], "vl_connector.pad_embed": [2, 2304],
        "vl_connector.pooling.q_w.weight": [1152, 2304], "vl_connector.pooling.kv_w.weight": [2304, 2304],
        "vl_connector.pooling.out.weight": [1152, 1152], "vl_connector.pooling.out.bias": [1152],
        "vl_connector.projector.up.weight": [12288, 1152], "vl_connector.projector.down.weight": [2048, 6144],
        **{f"vl_connector.pooling.{letter}_b": [1152] for letter in "qkv"},
    }  # fmt: skip
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
            "attn.qkv_w.weight": [4096, 2048], "attn.out.weight": [2048, 2048], "attn.q_lnorm.weight": [128],
            "attn.k_lnorm.weight": [128], "ffn.up.weight": [12288, 2048], "ffn.down.weight": [2048, 6144],
            "attn_lnorm.weight": [2048], "ffn_lnorm.weight": [2048],
            "attn.q_b": [2048], "attn.k_b": [1024], "attn.v_b": [1024],
        }  # fmt: skip
        text |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | {f"model.language_model.{name}": s for name, s in text.items()} | {"lm_head.weight": [151936, 2048]}


def write_checkpoint(folder: Path) -> None:
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


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def load(folder: str, connection) -> None:
    import jina_vlm

    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(folder, dtype="auto")
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    connection.send({"weights": weights, "peak": peak - before, "seconds": seconds})


def measure(folder: Path) -> dict:
    """Loads the checkpoint in a fresh process: bytes of weights, peak of anonymous memory above what the process had
    before, seconds."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=load, args=(str(folder), sender))
    process.start()
    result = receiver.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint (4.9 GB); a temporary folder if left out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print("writing a random 2.4B checkpoint in the released layout ...", flush=True)
        write_checkpoint(Path(folder))
        result = measure(Path(folder))
    print(f"weights {result['weights'] / 1e9:.2f} GB, peak anonymous memory {result['peak'] / 1e9:.2f} GB,")
    print(f"ratio {result['peak'] / result['weights']:.3f}, {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
