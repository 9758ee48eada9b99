"""Questions about images, as the release's own command asks them: which images belong to which, and how they are put.
Imports nothing that takes time: names of images are judged before anything is loaded."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from typing import Any

from jina_vlm_tools.cli.options import STDIN, check_images, is_url


@dataclass(frozen=True)
class Question:
    """`images`: by their names, in the order in which they are shown."""

    prompt: str
    images: tuple[str, ...] = ()


def find_images(names: list[str]) -> list[str]:
    """
    The images that names stand for: paths, URLs, data URIs and `-` for themselves, patterns for the files that they
    match, sorted.

    Raises:
        ValueError: a pattern matches no file, or stdin is named twice.
        FileNotFoundError, IsADirectoryError: a path that leads to no file.
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


def make_questions(prompts: list[str], images: list[str], each: bool = False) -> list[Question]:
    """Every prompt about all images together or, with `each`, about each image alone: image by image."""
    if each:
        return [Question(prompt, (image,)) for image in images for prompt in prompts]
    return [Question(prompt, tuple(images)) for prompt in prompts]


def open_in_turn(questions: list[Question], open_image: Callable[[str], Any]) -> Iterator[tuple[Question, list]]:
    """
    Each question with its images, which are opened when it is its turn. Questions about the same images that follow
    each other get the same list.

    Raises:
        OSError, ValueError: an image cannot be read; the message says why.
    """
    names, images = None, []
    for question in questions:
        if question.images != names:
            names, images = question.images, [open_image(name) for name in question.images]
        yield question, images


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
