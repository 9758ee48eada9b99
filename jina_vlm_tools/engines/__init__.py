"""Engines beside torch, and which of them a checkpoint is for. Imports nothing that takes time."""

import json
import re
from dataclasses import dataclass
from pathlib import Path


TORCH, LLAMA_CPP, ONNX, OPENVINO = ENGINES = ("torch", "llama.cpp", "onnx", "openvino")


@dataclass(frozen=True)
class Folder:
    """What a checkpoint for an engine is: `model_type` in its config.json, `format` of `convert --to`, `extra` of the
    package, and `quantization`, one that is a good beginning."""

    model_type: str
    format: str
    extra: str
    quantization: str


FOLDERS = {
    LLAMA_CPP: Folder("jina_vlm_llama_cpp", "gguf", "llama", "Q4_K_M"),
    ONNX: Folder("jina_vlm_onnx", "onnx", "onnx", "int8"),
    OPENVINO: Folder("jina_vlm_openvino", "openvino", "openvino", "int8"),
}
# Runs in a page, and by no command here. Its `model_type` is another model's, so that another key tells it.
TRANSFORMERS_JS = "transformers.js"
BROWSER = Folder("jina_vlm_transformers_js", TRANSFORMERS_JS, "onnx", "int8")
CONVERTED_TYPE = "converted_type"
TARGETS = {**FOLDERS, TRANSFORMERS_JS: BROWSER}

# What `convert` writes for engines
_WRITTEN = re.compile(
    r"(config|generation_config|processor_config|tokenizer|tokenizer_config)\.json|chat_template\.jinja"
    r"|model\.safetensors|text-\w+\.gguf|(tower|connector|embedding|decoder)\.(onnx|onnx\.data|xml|bin)"
    r"|onnx|onnx/(vision_encoder|embed_tokens|decoder_model_merged)\w*\.onnx(_data)?|index\.html|jina_vlm\.js"
)


def list_others(folder: Path) -> list[str]:
    """What is in a folder for an engine that `convert` did not put there."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return sorted(name for name in names if not _WRITTEN.fullmatch(name))


def find_engine(checkpoint: str | Path) -> str:
    """Tell which engine a checkpoint is for. A repository of the Hub, or a folder that says nothing, is for torch."""
    try:
        config = json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return TORCH
    if not isinstance(config, dict):
        return TORCH
    model_type = config.get(CONVERTED_TYPE) or config.get("model_type")
    return next((engine for engine, folder in TARGETS.items() if folder.model_type == model_type), TORCH)


def check_engine(checkpoint: str, engine: str | None) -> str:
    """
    Settle which engine runs a checkpoint.

    Args:
        engine: What was asked for; None for the one that the checkpoint is for.

    Returns:
        One of `ENGINES`.

    Raises:
        ValueError: it is for another one; the message says how to make one that fits.
    """
    found = find_engine(checkpoint)
    if found == TRANSFORMERS_JS:
        raise ValueError(
            f"{checkpoint} was converted for {found}, which runs in a browser: python -m http.server --directory "
            f"{checkpoint}. Here name the checkpoint that it was converted from."
        )
    if engine in (None, found):
        return found
    if found == TORCH:
        folder = FOLDERS[engine]
        raise ValueError(
            f"{checkpoint} is for torch. For {engine} convert it first, and name the folder that this makes: "
            f"jina-vlm convert {checkpoint} FOLDER --to {folder.format} --quantize {folder.quantization}"
        )
    instead = "Name"
    if engine != TORCH:
        instead = f"Leave --engine, or name what `jina-vlm convert --to {FOLDERS[engine].format}` makes of"
    raise ValueError(
        f"{checkpoint} was converted for {found}, and does not run by {engine}. {instead} the checkpoint that it was "
        "converted from."
    )
