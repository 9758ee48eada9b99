"""From MLX's copy of the release (`jinaai/jina-vlm-mlx`) back to the released layout.

Such a folder holds most matrices in groups of few bits, under the names of mlx-vlm's modules, and the released config
with `quantization` in it. Which matrices are quantized is told by the `scales` beside them.
"""

import json
import math
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch
from jina_vlm import JinaVLMProcessor
from jina_vlm.conversion_jina_vlm import convert_config, is_released_config
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .check import INDEX


# Of other widths some numbers lie across two bytes.
BITS = (2, 4, 8)
FLOATS = ("F32", "F16", "BF16")
READ = ("*.json", "*.jinja", "*.txt", "*.safetensors")
SHARD_SIZE = 2**30  # bytes that are in memory before they are written
MOST_TOLD = 20  # faults in one error

# mlx-vlm's names, and the released ones that each is divided among, in equal parts
_FIXED_NAMES = {
    "vision_model.patch_embed.proj.weight": ("model.vision_model.patch_embed.proj.weight",),
    "vision_model.patch_embed.proj.bias": ("model.vision_model.patch_embed.proj.bias",),
    "vision_model.pos_embed": ("model.vision_model.pos_embed",),
    "vision_model.post_norm.weight": ("model.vision_model.post_lnorm.weight",),
    "vision_model.post_norm.bias": ("model.vision_model.post_lnorm.bias",),
    "vl_connector.pad_embed": ("model.vision_model.vl_connector.pad_embed",),
    "vl_connector.pooling.q.weight": ("model.vision_model.vl_connector.pooling.q_w.weight",),
    "vl_connector.pooling.q.bias": ("model.vision_model.vl_connector.pooling.q_b",),
    "vl_connector.pooling.kv.weight": ("model.vision_model.vl_connector.pooling.kv_w.weight",),
    "vl_connector.pooling.kv.bias": (
        "model.vision_model.vl_connector.pooling.k_b",
        "model.vision_model.vl_connector.pooling.v_b",
    ),
    "vl_connector.pooling.out.weight": ("model.vision_model.vl_connector.pooling.out.weight",),
    "vl_connector.pooling.out.bias": ("model.vision_model.vl_connector.pooling.out.bias",),
    "vl_connector.projector.gate_up.weight": ("model.vision_model.vl_connector.projector.up.weight",),
    "vl_connector.projector.down.weight": ("model.vision_model.vl_connector.projector.down.weight",),
    "language_model.embedding.embedding": ("model.language_model.embedding.embedding",),
    "language_model.embedding.new_embedding": ("model.language_model.embedding.new_embedding",),
    "language_model.ln_f.weight": ("model.language_model.ln_f.weight",),
    "language_model.lm_head.weight": ("lm_head.weight",),
}
_BLOCK_NAMES = {
    "vision_model": {
        "attn_norm.weight": ("attn_lnorm.weight",),
        "attn_norm.bias": ("attn_lnorm.bias",),
        "attn.qkv.weight": ("attn.qkv_w.weight",),
        "attn.qkv.bias": ("attn.q_b", "attn.k_b", "attn.v_b"),
        "attn.out.weight": ("attn.out.weight",),
        "attn.out.bias": ("attn.out.bias",),
        "ffn_norm.weight": ("ffn_lnorm.weight",),
        "ffn_norm.bias": ("ffn_lnorm.bias",),
        "ffn.up.weight": ("ffn.up.weight",),
        "ffn.up.bias": ("ffn.up.bias",),
        "ffn.down.weight": ("ffn.down.weight",),
        "ffn.down.bias": ("ffn.down.bias",),
    },
    "language_model": {
        "attn_norm.weight": ("attn_lnorm.weight",),
        "attn.qkv.weight": ("attn.qkv_w.weight",),
        "attn.q_norm.weight": ("attn.q_lnorm.weight",),
        "attn.k_norm.weight": ("attn.k_lnorm.weight",),
        "attn.out.weight": ("attn.out.weight",),
        "ffn_norm.weight": ("ffn_lnorm.weight",),
        # the values before the gate, as in the release, whatever the name says
        "ffn.gate_up.weight": ("ffn.up.weight",),
        "ffn.down.weight": ("ffn.down.weight",),
    },
}


def is_mlx_config(config: dict) -> bool:
    """Tell whether a parsed `config.json` is that of a copy which MLX quantized."""
    return is_released_config(config) and bool(_get_quantization(config))


def dequantize(packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int) -> torch.Tensor:
    """
    Compute `number * scale + bias` group by group: the bits that `mlx.core.dequantize` gives.

    Args:
        packed: [rows, columns * bits / 32] uint32, of numbers of `bits` bits each, the lowest bits first.
        scales, biases: [rows, groups], of the dtype in which the product is rounded, and then the sum.
        bits: 2, 4 or 8.

    Returns:
        [rows, columns], of the scales' dtype.
    """
    octets = packed.view(torch.uint8)  # the lowest first
    numbers = torch.stack([(octets >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1).flatten(1)
    groups = numbers.unflatten(1, (scales.shape[1], -1)).to(scales.dtype)
    return groups.mul_(scales[:, :, None]).add_(biases[:, :, None]).flatten(1)


def restore_released(source: Path, target: Path) -> str:
    """
    Write the copy in the folder `source`, dequantized, into `target`: in the released layout, with its settings and
    its tokenizer. Tensors are read one by one, and written as soon as they make up a gigabyte.

    Returns:
        A sentence on what was done.

    Raises:
        ValueError: the quantization is none that `dequantize` knows; or tensors are damaged, missing, unknown, or do
            not fit together. It names them, and nothing has been written.
        OSError, SafetensorError: `target` cannot be written.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    # A dtype there is that of the weights before they were quantized.
    dropped = ("quantization", "quantization_config", "dtype", "torch_dtype")
    released = {key: value for key, value in config.items() if key not in dropped}
    convert_config(released)  # raises where a setting is missing
    names = list_names(released)
    with ExitStack() as stack:
        copy = _Copy(source, _get_quantization(config), stack)
        copy.check(names)
        for path in (path for pattern in READ for path in source.glob(pattern)):
            if path.suffix != ".safetensors" and path.name not in ("config.json", INDEX):
                shutil.copyfile(path, target / path.name)
        (target / "config.json").write_text(json.dumps(released), encoding="utf-8")
        _write(copy, names, target)
        kinds = [copy.get_groups(name) for name in names if copy.is_quantized(name)]
    groups = " and ".join(f"{size} weights of {bits} bits" for size, bits in sorted(set(kinds)))
    return (
        f"They were converted from MLX's layout: the {len(kinds)} matrices that it holds in groups of {groups} were "
        "dequantized, to the values that MLX computes with. What quantization rounded away is not restored. "
        "Tensors were renamed and split, and the tower's last blocks, which are never used, left out."
    )


def writes_images(processor: JinaVLMProcessor) -> bool:
    """Tell whether the chat template places an image. mlx-vlm gives its processor one that does not, and saves it."""
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    try:
        text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except (TemplateError, TypeError, ValueError):
        return False
    return processor.image_token in text


class _Copy:
    """The tensors in a folder that MLX wrote, by mlx-vlm's names."""

    def __init__(self, folder: Path, quantization: dict, stack: ExitStack) -> None:
        self.folder, self.quantization = folder, quantization
        self._files: dict[str, tuple[safe_open, str]] = {}  # and the name there
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read ({error}). Copy or download it again.") from error
            for name in file.keys():  # noqa: SIM118  it is no dictionary
                # mlx-vlm reads both names of the head.
                full = f"language_model.{name}" if name.startswith("lm_head.") else name
                if full in self._files:
                    raise ValueError(f"{folder} holds `{name}` twice. Leave the files of one checkpoint there.")
                self._files[full] = (file, name)

    def is_quantized(self, name: str) -> bool:
        return _beside(name, "scales") in self._files

    def get_groups(self, name: str) -> tuple[int, int]:
        """Weights in a group and bits of a weight; a module may have its own."""
        own = self.quantization.get(name.removesuffix(".weight"))
        settings = {**self.quantization, **(own if isinstance(own, dict) else {})}
        if settings.get("mode", "affine") != "affine":
            raise ValueError(
                f"`{name}` is quantized in the mode {settings['mode']!r}; only 'affine' can be dequantized here."
            )
        size, bits = settings.get("group_size"), settings.get("bits")
        if bits not in BITS or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"`{name}` is quantized in groups of {size!r} weights of {bits!r} bits; only {BITS} bits can be "
                "dequantized here."
            )
        return size, bits

    def read(self, name: str) -> torch.Tensor:
        """A tensor, dequantized."""
        if not self.is_quantized(name):
            return self._read(name)
        parts = (self._read(part) for part in (name, _beside(name, "scales"), _beside(name, "biases")))
        return dequantize(*parts, bits=self.get_groups(name)[1])

    def check(self, names: dict[str, tuple[str, ...]]) -> None:
        """
        Look at names, shapes and dtypes alone.

        Raises:
            ValueError: these are not the tensors of `names`, whole or quantized; it names the first of them.
        """
        quantized = {_beside(name, part) for name in names if self.is_quantized(name) for part in ("scales", "biases")}
        problems = [f"`{name}` is missing." for name in sorted(names.keys() - self._files.keys())]
        problems += [
            f"`{name}` is unknown: mlx-vlm's model has no such tensor."
            for name in sorted(self._files.keys() - names.keys() - quantized)
        ]
        for name in sorted(names.keys() & self._files.keys()):
            problems += self._check_quantized(name) if self.is_quantized(name) else self._check_whole(name)
        problems += [
            f"`{name}` has {rows} rows, which cannot be divided among {len(parts)}: {', '.join(parts)}."
            for name, parts in names.items()
            if name in self._files and (rows := math.prod(self._describe(name)[1][:1])) % len(parts)
        ]
        if problems:
            more = [f"And {len(problems) - MOST_TOLD} more."] if len(problems) > MOST_TOLD else []
            raise ValueError(
                "\n".join([f"Cannot read {self.folder}, which MLX quantized:", *problems[:MOST_TOLD], *more])
            )

    def _check_whole(self, name: str) -> list[str]:
        dtype, _ = self._describe(name)
        if dtype in FLOATS:
            return []
        return [f"`{name}` is {dtype}, and `{_beside(name, 'scales')}` is missing; expected one of {FLOATS}."]

    def _check_quantized(self, name: str) -> list[str]:
        try:
            size, bits = self.get_groups(name)
        except ValueError as error:
            return [str(error)]
        scales, biases = _beside(name, "scales"), _beside(name, "biases")
        if biases not in self._files:
            return [f"`{biases}` is missing."]
        dtype, shape = self._describe(name)
        if dtype != "U32" or len(shape) != 2:
            return [f"`{name}` is {dtype} of shape {shape}, but has scales; expected U32, [rows, columns]."]
        of_groups = self._describe(scales)
        expected = [shape[0], shape[1] * 32 // bits // size]
        if of_groups[0] not in FLOATS or of_groups[1] != expected or expected[1] * size * bits != shape[1] * 32:
            return [
                f"`{scales}` is {of_groups[0]} of shape {of_groups[1]}; expected {expected} of {FLOATS}, as `{name}` "
                f"has shape {shape}, in groups of {size} weights of {bits} bits."
            ]
        if self._describe(biases) != of_groups:
            return [f"`{biases}` is {self._describe(biases)}; expected {of_groups}, as `{scales}` is."]
        return []

    def _describe(self, name: str) -> tuple[str, list[int]]:
        file, stored = self._files[name]
        part = file.get_slice(stored)
        return part.get_dtype(), list(part.get_shape())

    def _read(self, name: str) -> torch.Tensor:
        file, stored = self._files[name]
        return file.get_tensor(stored)


def _beside(name: str, part: str) -> str:
    return f"{name.removesuffix('.weight')}.{part}"


def _get_quantization(config: dict) -> dict:
    """MLX's settings, which it writes twice; those of another method have a `quant_method`."""
    settings = config.get("quantization") or config.get("quantization_config") or {}
    return settings if isinstance(settings, dict) and "quant_method" not in settings else {}


def list_names(released: dict) -> dict[str, tuple[str, ...]]:
    """Every tensor of mlx-vlm's model of this config, before quantization, with the released ones that it holds."""
    names = dict(_FIXED_NAMES)
    for part, config in (("vision_model", released["vision_config"]), ("language_model", released["text_config"])):
        for layer in range(config["n_layers"]):
            for name, parts in _BLOCK_NAMES[part].items():
                block = f"{part}.layers.{layer}."
                names[block + name] = tuple(f"model.{block}{released_name}" for released_name in parts)
    return names


def _write(copy: _Copy, names: dict[str, tuple[str, ...]], target: Path) -> None:
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}

    def write_shard() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, target / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, parts in names.items():
        shard.update(zip(parts, copy.read(name).chunk(len(parts)), strict=True))
        if sum(part.nbytes for part in shard.values()) >= SHARD_SIZE:
            write_shard()
    if shard:
        write_shard()
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
