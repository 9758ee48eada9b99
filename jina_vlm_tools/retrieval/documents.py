"""Pages of a folder: its images, and those of its PDFs and TIFFs."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pypdfium2
from jina_vlm.image_loading_jina_vlm import FORMATS, open_image, to_rgb, to_tensor
from PIL import Image


PDF = ".pdf"
POINTS = 72  # of a PDF, an inch
DPI = 144  # at most
WHOLE = 0  # in the place of a page's number: the file


@dataclass(frozen=True)
class Page:
    """
    Args:
        file (`str`): In the folder, with / between names.
        page (`int`): From 1.
        pages (`int`): Of the file.
        sha256 (`str`): Of the file.
    """

    file: str
    page: int
    pages: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.file}, page {self.page} of {self.pages}" if self.pages > 1 else self.file


@dataclass(frozen=True)
class Unreadable:
    """A file, or a page of one, that cannot be used, and why. `page` is 0 for the file."""

    file: str
    page: int
    error: str


def find_files(folder: Path) -> list[str]:
    """The files of a folder and its subfolders that are named like images or PDFs, sorted. Hidden ones are left out.

    Raises:
        NotADirectoryError: there is no such folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such folder. Expected one with images or PDFs.")
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS} | {PDF}
    found = []
    for place, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [
            Path(place, name).relative_to(folder).as_posix()
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in endings
        ]
    return sorted(found)


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Document:
    """
    A file, as pages. Not for several threads at once.

    Args:
        path (`Path`): Of an image, a PDF, or a TIFF of several pages.
        max_pixels (`int`): No page of a PDF is drawn larger than this, nor finer than 144 dots an inch:
            what the image processor would scale down again.

    Raises:
        OSError, ValueError: it cannot be opened; the message says why.
    """

    def __init__(self, path: Path, max_pixels: int):
        self.path, self.max_pixels = path, max_pixels
        self.pdf = None
        if path.suffix.lower() == PDF:
            self.pdf = self._said(lambda: pypdfium2.PdfDocument(path))
            self.pdf.init_forms()  # what is filled in is shown
            self.pages = len(self.pdf)
        else:
            with open_image(path) as image:
                # Animations have frames as well, of one image.
                self.pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        if not self.pages:
            raise ValueError(f"{path} has no page.")

    def __enter__(self) -> Document:
        return self

    def __exit__(self, *_) -> None:
        if self.pdf is not None:
            self.pdf.close()

    def draw(self, page: int) -> Image.Image:
        """The image of a page, from 1: RGB, upright.

        Raises:
            OSError, ValueError: it cannot be drawn, or the file has no such page.
        """
        if not 1 <= page <= self.pages:
            raise ValueError(f"{self.path} has {self.pages} pages, and no page {page}.")
        if self.pdf is not None:
            return self._said(lambda: self._draw(self.pdf[page - 1]))
        with open_image(self.path) as image:
            image.seek(page - 1)
            return Image.fromarray(to_tensor(to_rgb(image)).permute(1, 2, 0).numpy())

    def _draw(self, page: pypdfium2.PdfPage) -> Image.Image:
        width, height = page.get_size()
        if not width * height > 0:
            raise ValueError(f"A page of {width} x {height} points")
        scale = min(DPI / POINTS, math.sqrt(self.max_pixels / (width * height)))
        if min(width, height) * scale < 1:
            raise ValueError(f"A page of {width:.0f} x {height:.0f} points is thinner than a pixel")
        return page.render(scale=scale).to_pil().convert("RGB")

    def _said(self, step: Callable):
        try:
            return step()
        except (pypdfium2.PdfiumError, ValueError) as error:
            reason = str(error).rstrip(".")
            if "password" in reason.lower():
                reason = "it is encrypted, and needs a password"
            raise ValueError(f"{self.path} cannot be read as a PDF: {reason}.") from error


def draw(folder: Path, page: Page, max_pixels: int) -> Image.Image:
    """The image of one page.

    Raises:
        OSError, ValueError: the file is gone, has changed since, or cannot be read.
    """
    path = folder / page.file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is gone. `jina-vlm index` brings the index up to date.")
    if digest(path) != page.sha256:
        raise ValueError(f"{path} has changed since it was indexed. `jina-vlm index` brings the index up to date.")
    with Document(path, max_pixels) as document:
        return document.draw(page.page)


def draw_all(folder: Path, files: dict[str, str], done: set[tuple[str, int]], max_pixels: int) -> Iterator:
    """Each page of files (file: sha256) that is not `done`, with its image: ([`Page`], `Image`), or [`Unreadable`] for
    what cannot be used."""
    for file, sha256 in files.items():
        try:
            with Document(folder / file, max_pixels) as document:
                for number in range(1, document.pages + 1):
                    if (file, number) in done:
                        continue
                    try:
                        yield Page(file, number, document.pages, sha256), document.draw(number)
                    except (OSError, ValueError) as error:
                        yield Unreadable(file, number, str(error))
        except (OSError, ValueError) as error:
            yield Unreadable(file, WHOLE, str(error))
