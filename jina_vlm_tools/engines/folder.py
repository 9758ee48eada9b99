"""What folders for engines beside torch have in common: the checkpoint that they are made of, settings, the check."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jina_vlm import JinaVLMConfig, JinaVLMForConditionalGeneration, JinaVLMProcessor
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from jina_vlm_tools.files import TEMPLATE
from jina_vlm_tools.hub import PublishingError
from jina_vlm_tools.hub.assemble import cover_structural_rows
from jina_vlm_tools.hub.mlx import is_mlx_config

from .model import EngineForConditionalGeneration


ROOM_BESIDE_WEIGHTS = 64 * 1024**2  # tokenizer and settings, graphs, or the vocabulary in a GGUF file
QUESTION, NEW_TOKENS = "Describe the picture.", 8  # of the check


def load_checkpoint(weights: str) -> tuple[JinaVLMForConditionalGeneration, JinaVLMProcessor]:
    """
    A checkpoint whose weights stay in their files until they are used.

    Args:
        weights: A folder or an id of the Hub, in the released layout or this one.

    Raises:
        OSError, ValueError: it cannot be read; the message names what is wrong with it.
    """
    config, _ = PreTrainedConfig.get_config_dict(weights)
    if is_mlx_config(config):
        raise ValueError(f"{weights} was quantized by MLX. Convert it to this layout first, and that for an engine.")
    processor = JinaVLMProcessor.from_pretrained(weights)
    return JinaVLMForConditionalGeneration.from_pretrained(weights, dtype="auto"), processor


def complete(model: JinaVLMForConditionalGeneration, processor: JinaVLMProcessor) -> None:
    """Cover the rows of structural tokens, which engines could sample, and add the chat template that is missing."""
    cover_structural_rows(model)
    if processor.chat_template is None:
        processor.chat_template = TEMPLATE.read_text(encoding="utf-8")


def check_room(folder: Path, needed: float) -> None:
    """
    Args:
        needed: Bytes of weights.

    Raises:
        PublishingError: the disk has no room for them and what lies beside them.
    """
    needed += ROOM_BESIDE_WEIGHTS
    if (free := shutil.disk_usage(folder).free) < needed:
        raise PublishingError(
            f"{folder.parent} is too small: {free / 1e9:.2f} GB are free, {needed / 1e9:.2f} GB are needed for a "
            "while. Make room there, or choose another folder. Nothing was left behind."
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """
    Raises:
        PublishingError: for what the disk or the engine's writer say.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise PublishingError(
            f"{folder.parent} could not take the checkpoint: {error}. Nothing was left behind."
        ) from error


def write_settings(
    model: JinaVLMForConditionalGeneration,
    processor: JinaVLMProcessor,
    folder: Path,
    model_class: type[EngineForConditionalGeneration],
    dtype: str,
    **settings: Any,
) -> None:
    """
    Write all but the weights.

    Args:
        model_class: The class that loads the folder.
        dtype: Of its weights in torch, or of its computation.
        settings: Of the class's config.
    """
    kept = model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "dtype", "transformers_version", "quantization_config"):
        kept.pop(key, None)
    config: JinaVLMConfig = model_class.config_class(**{**kept, "tie_word_embeddings": False, **settings})
    config.architectures, config.dtype = [model_class.__name__], dtype
    config.to_json_file(folder / "config.json")
    write_processor(model, processor, folder)


def write_processor(model: JinaVLMForConditionalGeneration, processor: JinaVLMProcessor, folder: Path) -> None:
    """Write how it generates, and what makes its inputs; no file in `folder` names code any more."""
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    # This package runs the folder: it needs no code of its own.
    for path in folder.glob("*.py"):
        path.unlink()
    for path in folder.glob("*.json"):
        if path.name != "tokenizer.json":
            written = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(_without_code(written), indent=2) + "\n", encoding="utf-8")


def _without_code(settings):
    if not isinstance(settings, dict):
        return settings
    return {key: _without_code(value) for key, value in settings.items() if key != "auto_map"}


def draw_image() -> Image.Image:
    """What a folder is asked about."""
    image = Image.new("RGB", (240, 180), "white")
    ImageDraw.Draw(image).ellipse((70, 40, 170, 140), fill="red")
    return image


def ask(folder: Path) -> str:
    """
    The answer that the folder gives to a drawn image, in a fresh process.

    Raises:
        PublishingError: it does not load, or says nothing.
    """
    file = io.BytesIO()
    draw_image().save(file, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    options = ["--model", str(folder.resolve()), "--json", "--max-tiles", "1", "--max-new-tokens", str(NEW_TOKENS)]
    process = subprocess.run(
        [sys.executable, "-m", "jina_vlm_tools", "ask", uri, QUESTION, *options],
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
