"""Make of a checkpoint a folder for llama.cpp: the text model as a GGUF file, all else beside it."""

import re
from pathlib import Path

import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from safetensors.torch import save_file

from .folder import check_room, complete, load_checkpoint, write_settings, writing
from .gguf_file import write_text_model
from .llama_cpp import LlamaCppForConditionalGeneration
from .quantization import WHOLE


IN_TORCH = ("model.vision_model.", "model.connector.")


def convert_for_llama_cpp(weights: str, folder: Path, quantization: str, dtype: str = "auto") -> dict[str, int]:
    """
    Write a checkpoint into `folder`, for [`LlamaCppForConditionalGeneration`]. Weights stay in their files until they
    are written, one by one.

    Args:
        weights: A folder or an id of the Hub, in the released layout or this one.
        folder: An empty one.
        quantization: Of the text model: one of `QUANTIZATIONS`.
        dtype: Of tower and connector; `"auto"` is the checkpoint's own.

    Returns:
        How many of the text model's tensors have which of llama.cpp's types.

    Raises:
        PublishingError: the disk is too small or full.
        OSError, ValueError: the checkpoint cannot be read, or does what llama.cpp cannot; the message names it.
    """
    model, processor = load_checkpoint(weights)
    return write_for_llama_cpp(model, processor, folder, Path(weights).resolve().name, quantization, dtype)


def write_for_llama_cpp(
    model: JinaVLMForConditionalGeneration,
    processor: JinaVLMProcessor,
    folder: Path,
    name: str,
    quantization: str,
    dtype: str = "auto",
) -> dict[str, int]:
    """As [`convert_for_llama_cpp`], of a model and a processor. The model's rows for structural tokens are covered."""
    complete(model, processor)
    vision_dtype = model.dtype if dtype == "auto" else getattr(torch, dtype)
    text_file = f"text-{quantization}.gguf"
    check_room(folder, _count_bytes(model, quantization, vision_dtype))
    with writing(folder):
        tensors = write_text_model(model, processor, folder / text_file, name, quantization)
        _write_vision(model, folder, vision_dtype)
        kind = str(vision_dtype).removeprefix("torch.")
        write_settings(model, processor, folder, LlamaCppForConditionalGeneration, kind, text_file=text_file)
    return tensors


def _count_bytes(model: JinaVLMForConditionalGeneration, quantization: str, dtype: torch.dtype) -> float:
    vision = sum(tensor.numel() for name, tensor in model.state_dict().items() if name.startswith(IN_TORCH))
    text = model.num_parameters() - vision
    of_vision = vision * dtype.itemsize
    if quantization in WHOLE:
        return text * getattr(torch, WHOLE[quantization]).itemsize + of_vision
    # with scales, and some matrices in a larger type, at most a bit and a half more than the name says
    quantized = text * (int(re.search(r"\d", quantization)[0]) + 1.5) / 8
    return quantized + max(text * model.dtype.itemsize, of_vision)  # one after the other


def _write_vision(model: JinaVLMForConditionalGeneration, folder: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(IN_TORCH)}
    rows = model.get_input_embeddings().weight.detach()[model.config.structural_token_ids]
    tensors["model.language_model.embed_tokens.weight"] = rows
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
