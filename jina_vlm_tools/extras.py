"""Extras of the package, and what is said where one is not installed."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager


# What verbs need beside the package's own dependencies: modules, by the extra of the package that brings them. Of an
# engine the first one runs checkpoints, and all make them.
EXTRAS = {
    "serve": ("accelerate", "fastapi", "uvicorn", "openai"),
    "batch": ("accelerate", "datasets"),
    "app": ("gradio",),
    "llama": ("llama_cpp", "gguf"),
    "onnx": ("onnxruntime", "onnx", "onnx_ir", "onnxscript", "nncf"),
    "openvino": ("openvino", "onnx", "onnx_ir", "onnxscript", "nncf"),
    "search": ("accelerate", "peft", "pyarrow", "pypdfium2", "scipy"),
    "retrieval": ("accelerate", "datasets", "peft", "scipy", "sentence_transformers"),
    "train": ("accelerate", "datasets", "peft", "tensorboard", "matplotlib", "yaml"),
}


RUNTIMES = {"llama": "llama-cpp-python", "onnx": "onnxruntime", "openvino": "openvino"}  # brings the first


def missing(extra: str) -> list[str]:
    """The modules of an extra that are not installed."""
    return [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]


@contextmanager
def needing(extra: str, what: str | None = None) -> Iterator[None]:
    """
    The imports of `what` needs an extra of the package: of the verb of that name, where nothing else is named.

    Raises:
        OSError: a part of it is not installed; the message says what to install.
    """
    with _importing(missing(extra), f'{what or f"`jina-vlm {extra}`"} needs `pip install ".[{extra}]"` in a checkout'):
        yield


@contextmanager
def running(extra: str, what: str) -> Iterator[None]:
    """
    The imports of `what` needs an engine, to run what was converted elsewhere.

    Raises:
        OSError: it is not installed; the message says what to install.
    """
    absent = [name for name in missing(extra) if name == EXTRAS[extra][0]]
    with _importing(absent, f"{what} needs `pip install {RUNTIMES[extra]}`"):
        yield


@contextmanager
def _importing(absent: list[str], needs: str) -> Iterator[None]:
    try:
        if absent:
            raise ImportError(f"not installed: {', '.join(absent)}")
        yield
    except ImportError as error:
        raise OSError(f"{needs} ({error}).") from error
