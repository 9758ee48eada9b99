"""Released checkpoints as mlx-vlm quantizes and writes them."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


# What mlx-vlm's processor takes for a chat template where there is none, and saves
STAND_IN = "{% for message in messages %}{{ '<|user|>\n' + message['content'] + '\n' }}{% endfor %}<|assistant|>\n"


def mlx_name(released: str) -> str:
    name = released.removeprefix("model.").replace("vision_model.vl_connector.", "vl_connector.")
    name = re.sub(r"_lnorm\.", "_norm.", name)
    name = re.sub(r"\.(qkv|q|kv)_w\.", r".\1.", name)
    name = re.sub(r"(language_model\..*ffn|projector)\.up\.", r"\1.gate_up.", name)
    return re.sub(r"^lm_head", "language_model.lm_head", name)


def fuse_biases(tensors: dict[str, torch.Tensor]) -> None:
    """As mlx-vlm's layers have them. The text model's, all zero, are left out."""
    for module in [name.removesuffix(".q_b") for name in tensors if name.endswith(".q_b")]:
        q, k, v = (tensors.pop(f"{module}.{letter}_b") for letter in "qkv")
        if module.endswith("pooling"):
            tensors |= {f"{module}.q.bias": q, f"{module}.kv.bias": torch.cat([k, v])}
        elif module.startswith("vision_model"):
            tensors[f"{module}.qkv.bias"] = torch.cat([q, k, v])


def quantize(weight: torch.Tensor, bits: int, group_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A matrix in groups, to the nearest of the numbers between the smallest weight and the largest: the tensors that
    MLX holds it in, and the matrix that they stand for."""
    groups = weight.unflatten(1, (-1, group_size))
    biases = groups.amin(-1)
    scales = ((groups.amax(-1) - biases) / (2**bits - 1)).clamp(min=1e-4)
    numbers = ((groups - biases[..., None]) / scales[..., None]).float().round().clamp(0, 2**bits - 1)
    whole = (numbers.to(weight.dtype) * scales[..., None] + biases[..., None]).flatten(1)
    in_words = numbers.long().flatten(1).unflatten(1, (-1, 32 // bits))
    words = sum(in_words[..., place] << bits * place for place in range(32 // bits))
    return {"weight": words.to(torch.uint32), "scales": scales, "biases": biases}, whole


def save_mlx_copy(
    released: Path, folder: Path, bits: int = 4, group_size: int = 64, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """
    Write a released checkpoint as `jinaai/jina-vlm-mlx` is: every matrix is quantized whose rows can be cut into
    groups, but for those of the text's first block and embeddings. Parts of a matrix are in different files.

    Returns:
        What the released tensors are after that.
    """
    folder.mkdir()
    for path in released.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((released / "config.json").read_text())
    settings = {"group_size": group_size, "bits": bits, "mode": "affine"}
    config |= {"dtype": "float32", "quantization": settings, "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))

    tensors: dict[str, torch.Tensor] = {}
    after = {name: tensor.to(dtype) for name, tensor in load_file(released / "model.safetensors").items()}
    for released_name, tensor in after.items():
        name = mlx_name(released_name)
        is_whole = not name.endswith(".weight") or name.startswith("language_model.layers.0.")
        if is_whole or tensor.ndim != 2 or tensor.shape[1] % group_size:
            tensors[name] = tensor
            continue
        parts, after[released_name] = quantize(tensor, bits, group_size)
        tensors |= {f"{name.removesuffix('weight')}{part}": values for part, values in parts.items()}
    fuse_biases(tensors)

    names = sorted(tensors)
    weight_map = {}
    for first in range(2):
        file = f"model-0000{first + 1}-of-00002.safetensors"
        shard = {name: tensors[name].contiguous() for name in names[first::2]}
        save_file(shard, folder / file, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return after
