"""Make of a checkpoint a folder for llama.cpp: the text model as a GGUF file, all else beside it."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from jina_vlm_tools.files import TEMPLATE
from jina_vlm_tools.hub import PublishingError
from jina_vlm_tools.hub.assemble import cover_structural_rows
from jina_vlm_tools.hub.mlx import is_mlx_config

from .gguf_file import write_text_model
from .llama_cpp import LlamaCppConfig, LlamaCppForConditionalGeneration
from .quantization import WHOLE


ROOM_BESIDE_WEIGHTS = 64 * 1024**2  # tokenizer and settings, and the vocabulary in the GGUF file
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
    config, _ = PreTrainedConfig.get_config_dict(weights)
    if is_mlx_config(config):
        raise ValueError(f"{weights} was quantized by MLX. Convert it to this layout first, and that for llama.cpp.")
    processor = JinaVLMProcessor.from_pretrained(weights)
    model = JinaVLMForConditionalGeneration.from_pretrained(weights, dtype="auto")
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
    cover_structural_rows(model)
    if processor.chat_template is None:
        processor.chat_template = TEMPLATE.read_text(encoding="utf-8")
    vision_dtype = model.dtype if dtype == "auto" else getattr(torch, dtype)
    text_file = f"text-{quantization}.gguf"
    _check_room(model, folder, quantization, vision_dtype)
    try:
        tensors = write_text_model(model, processor, folder / text_file, name, quantization)
        _write_vision(model, folder, vision_dtype)
        _write_settings(model, processor, folder, text_file, vision_dtype)
    except (OSError, SafetensorError) as error:
        raise PublishingError(
            f"{folder.parent} could not take the checkpoint: {error}. Nothing was left behind."
        ) from error
    return tensors


def _check_room(model: JinaVLMForConditionalGeneration, folder: Path, quantization: str, dtype: torch.dtype) -> None:
    vision = sum(tensor.numel() for name, tensor in model.state_dict().items() if name.startswith(IN_TORCH))
    text = model.num_parameters() - vision
    of_vision = vision * dtype.itemsize
    if quantization in WHOLE:
        needed = text * getattr(torch, WHOLE[quantization]).itemsize + of_vision
    else:  # with scales, and some matrices in a larger type, at most a bit and a half more than the name says
        quantized = text * (int(re.search(r"\d", quantization)[0]) + 1.5) / 8
        needed = quantized + max(text * model.dtype.itemsize, of_vision)  # one after the other
    needed += ROOM_BESIDE_WEIGHTS
    if (free := shutil.disk_usage(folder).free) < needed:
        raise PublishingError(
            f"{folder.parent} is too small: {free / 1e9:.2f} GB are free, {needed / 1e9:.2f} GB are needed for a "
            "while. Make room there, or choose another folder. Nothing was left behind."
        )


def _write_vision(model: JinaVLMForConditionalGeneration, folder: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(IN_TORCH)}
    rows = model.get_input_embeddings().weight.detach()[model.config.structural_token_ids]
    tensors["model.language_model.embed_tokens.weight"] = rows
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_settings(model, processor: JinaVLMProcessor, folder: Path, text_file: str, dtype: torch.dtype) -> None:
    kept = model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "dtype", "transformers_version", "quantization_config"):
        kept.pop(key, None)
    config = LlamaCppConfig(**{**kept, "tie_word_embeddings": False, "text_file": text_file})
    config.architectures = [LlamaCppForConditionalGeneration.__name__]
    config.dtype = str(dtype).removeprefix("torch.")
    config.to_json_file(folder / "config.json")
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    # This package runs the folder: it needs no code of its own.
    for path in folder.glob("*.py"):
        path.unlink()
    for path in folder.glob("*.json"):
        if path.name != "tokenizer.json":
            settings = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(_without_code(settings), indent=2) + "\n", encoding="utf-8")


def _without_code(settings):
    if not isinstance(settings, dict):
        return settings
    return {key: _without_code(value) for key, value in settings.items() if key != "auto_map"}


def ask(folder: Path) -> str:
    """
    The answer that the folder gives to a drawn image, in a fresh process.

    Raises:
        PublishingError: it does not load, or says nothing.
    """
    image, file = Image.new("RGB", (240, 180), "white"), io.BytesIO()
    ImageDraw.Draw(image).ellipse((70, 40, 170, 140), fill="red")
    image.save(file, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    options = ["--model", str(folder.resolve()), "--json", "--max-tiles", "1", "--max-new-tokens", "8"]
    process = subprocess.run(
        [sys.executable, "-m", "jina_vlm_tools", "ask", uri, "Describe the picture.", *options],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if process.returncode:
        raise PublishingError(f"{folder} does not load. It said:\n{process.stderr[-3000:]}")
    answer = json.loads(process.stdout)["answer"]
    if not answer:
        raise PublishingError(f"{folder} loads, but with an empty answer.")
    return answer
