"""Questions about images, as the release's own command asks them: which images are meant, and how questions are put.
Imports nothing that takes time: names of images are judged before anything is loaded."""

import os
from glob import glob, has_magic

from jina_vlm_tools.sources import STDIN, check_images, is_url


def find_images(names: list[str]) -> list[str]:
    """
    The images that names stand for: paths, URLs, data URIs and `-` for themselves, patterns for the files that they
    match, sorted.

    Raises:
        ValueError: a PDF, or stdin twice.
        FileNotFoundError, IsADirectoryError: a path or a pattern that leads to no file.
    """
    found = []
    for name in names:
        if os.path.isdir(name):
            pattern = os.path.join(name, "*.png")
            raise IsADirectoryError(
                f'{name} is a folder. Name one image in it, or a quoted pattern such as "{pattern}"; '
                "`jina-vlm batch` asks about whole folders."
            )
        if name == STDIN or is_url(name) or os.path.exists(name) or not has_magic(name):
            found.append(name)
        elif matched := sorted(path for path in glob(name, recursive=True) if os.path.isfile(path)):
            found += matched
        else:
            raise FileNotFoundError(
                f"{name}: no such image, and no file that this pattern matches. If it is a question, put it last, or "
                "each of several behind --prompt."
            )
    check_images(found)
    return found


def make_content(prompt: str, images: list, prompt_first: bool = False, label_images: bool = False) -> list[dict]:
    """
    The parts of a turn, for a chat template.

    Args:
        prompt_first: Put the prompt before the images.
        label_images: Put "Image 1:" and so on before the images, for prompts that call them so.
    """
    text, parts = {"type": "text", "text": prompt}, []
    for number, image in enumerate(images, 1):
        if label_images:
            parts.append({"type": "text", "text": f"Image {number}:"})
        parts.append({"type": "image", "image": image})
    return [text, *parts] if prompt_first else [*parts, text]
