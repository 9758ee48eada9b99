"""What people name checkpoints and images by, and what can be said of a name before anything is loaded."""

import os
import re
from pathlib import Path


RELEASED = "jinaai/jina-vlm"
MODEL_VARIABLE = "JINA_VLM_MODEL"
STDIN = "-"
MODEL_ADVICE = (
    f"Give --model, or the environment variable {MODEL_VARIABLE}, a folder that holds a checkpoint, such as "
    f"checkpoints/tiny, or a repository of the Hub that can be reached from here, such as {RELEASED}."
)


def check_model(name: str, option: str = "--model", advice: str = MODEL_ADVICE) -> None:
    """
    Raises:
        ValueError: neither a folder nor the name of a repository.
    """
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ValueError(
            f"{option} {name}: neither a folder nor the name of a repository on the Hub (owner/name). {advice}".strip()
        )


def is_url(source: str) -> bool:
    """Whether it is judged where it is opened. "OCR:" is no URL."""
    return re.match("[a-z][a-z0-9+.-]+://|data:[^\\s]", source, flags=re.IGNORECASE) is not None


def is_pdf(path: str) -> bool:
    """Whether a file begins as PDFs do, whatever its name."""
    try:
        with open(path, "rb") as file:
            return file.read(5) == b"%PDF-"
    except OSError:
        return False  # it is told where it is opened


def check_image(source: str) -> None:
    """
    Raises:
        FileNotFoundError, IsADirectoryError: a path that leads to no file.
        ValueError: a PDF.
    """
    if source == STDIN or is_url(source):
        return
    if os.path.isfile(source):
        if not is_pdf(source):
            return
        raise ValueError(
            f"{source} is a PDF. Ask about its pages by `jina-vlm index FOLDER`, of the folder that it is in, and "
            "`jina-vlm ask --index FOLDER`; or name images of them."
        )
    if os.path.isdir(source):
        raise IsADirectoryError(f"{source} is a folder. Name one image in it.")
    raise FileNotFoundError(f"{source}: no such image. Expected a path, an http(s) URL, a data URI, or - for stdin.")


def check_images(sources: list[str]) -> None:
    for source in sources:
        check_image(source)
    if sources.count(STDIN) > 1:
        raise ValueError("- stands for one image on stdin, and was given several times.")
