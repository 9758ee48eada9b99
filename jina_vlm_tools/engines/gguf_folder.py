"""Make of a checkpoint a folder for llama.cpp: the text model as a GGUF file, all else beside it."""

import re
from pathlib import Path

import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from safetensors.torch import save_file

from . import TORCH
from .folder import check_room, complete, load_checkpoint, write_settings, writing
from .gguf_file import write_text_model
from .llama_cpp import LlamaCppForConditionalGeneration
from .quantization import VISIONS, WHOLE, Vision


IN_TORCH = ("model.vision_model.", "model.connector.")
GRAPHS = ["tower", "connector"]


def convert_for_llama_cpp(
    weights: str,
    folder: Path,
    quantization: str,
    dtype: str = "auto",
    vision: Vision = VISIONS[TORCH],
    pages: Path | None = None,
) -> dict[str, str | int]:
    """
    Write a checkpoint into `folder`, for [`LlamaCppForConditionalGeneration`]. Weights stay in their files until they
    are written, one by one.

    Args:
        weights: A folder or an id of the Hub, in the released layout or this one.
        folder: An empty one.
        quantization: Of the text model: one of `QUANTIZATIONS`.
        dtype: Of tower and connector by torch; `"auto"` is the checkpoint's own.
        vision: One of `VISIONS`: what runs tower and connector.
        pages: A folder of images and PDFs by which a tower's activations are quantized; None for drawn ones.

    Returns:
        How many of the text model's tensors have which of llama.cpp's types, and what the weights of graphs are.

    Raises:
        PublishingError: the disk is too small or full.
        OSError, ValueError: the checkpoint cannot be read, or does what llama.cpp cannot; the message names it.
    """
    model, processor = load_checkpoint(weights)
    name = Path(weights).resolve().name
    return write_for_llama_cpp(model, processor, folder, name, quantization, dtype, vision, pages)


def write_for_llama_cpp(
    model: JinaVLMForConditionalGeneration,
    processor: JinaVLMProcessor,
    folder: Path,
    name: str,
    quantization: str,
    dtype: str = "auto",
    vision: Vision = VISIONS[TORCH],
    pages: Path | None = None,
) -> dict[str, str | int]:
    """As [`convert_for_llama_cpp`], of a model and a processor. The model's rows for structural tokens are covered."""
    complete(model, processor)
    text_file = f"text-{quantization}.gguf"
    is_torch = vision.engine == TORCH
    if not is_torch:
        dtype = "float32"
    vision_dtype = model.dtype if dtype == "auto" else getattr(torch, dtype)
    check_room(folder, _count_bytes(model, quantization, vision_dtype, vision))
    tiles = None if is_torch else _graphs().find_tiles(processor, vision.quantization, pages)
    with writing(folder):
        kinds = write_text_model(model, processor, folder / text_file, name, quantization)
        if not is_torch:
            kinds |= _graphs().write_parts(model, folder, GRAPHS, vision.engine, vision.quantization, tiles)
        _write_tensors(model, folder, vision_dtype, IN_TORCH if is_torch else ())
        write_settings(
            model, processor, folder, LlamaCppForConditionalGeneration, str(vision_dtype).removeprefix("torch."),
            text_file=text_file, vision_engine=vision.engine,
        )  # fmt: skip
    return kinds


def _graphs():
    """The module that writes graphs, whose packages are needed for them alone."""
    from . import graph_folder

    return graph_folder


def _count_bytes(
    model: JinaVLMForConditionalGeneration, quantization: str, dtype: torch.dtype, vision: Vision
) -> float:
    numbers = sum(tensor.numel() for name, tensor in model.state_dict().items() if name.startswith(IN_TORCH))
    text = model.num_parameters() - numbers
    of_vision = numbers * dtype.itemsize
    if vision.engine != TORCH:
        of_vision = _graphs().count_bytes(model, GRAPHS, vision.engine, vision.quantization)
    if quantization in WHOLE:
        return text * getattr(torch, WHOLE[quantization]).itemsize + of_vision
    # with scales, and some matrices in a larger type, at most a bit and a half more than the name says
    quantized = text * (int(re.search(r"\d", quantization)[0]) + 1.5) / 8
    return quantized + max(text * model.dtype.itemsize, of_vision)  # one after the other


def _write_tensors(
    model: JinaVLMForConditionalGeneration, folder: Path, dtype: torch.dtype, kept: tuple[str, ...]
) -> None:
    """What torch needs: parts whose names begin so, and the embeddings of structural tokens."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(kept)}
    rows = model.get_input_embeddings().weight.detach()[model.config.structural_token_ids]
    tensors["model.language_model.embed_tokens.weight"] = rows
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
