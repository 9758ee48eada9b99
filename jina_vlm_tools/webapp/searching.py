"""Files of one user, found by a question page by page, with the weights that answer. Knows nothing of the page."""

import copy
import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from jina_vlm_tools.retrieval.documents import Document
from jina_vlm_tools.retrieval.embedder import JinaVLMEmbedder
from jina_vlm_tools.retrieval.embeddings import Embeddings
from jina_vlm_tools.retrieval.folder import read_folder
from jina_vlm_tools.retrieval.heat_maps import HeatMap, compare

from .answering import ImageChat
from .wording import without_folder


MAX_PAGES = 100  # of one user: 42 MB of vectors where a page has 814 tokens
MAX_LENGTH = 1000  # letters of a question
TOP = 5
SHOWN_SIDE = 960  # pixels of a page that was found
_drawing = threading.Lock()  # PDFium takes one thread at a time


def load_embedder(model, folder: str) -> JinaVLMEmbedder:
    """
    An embedder with a model's own weights. The adapter goes into modules of its own, around the same tensors: so the
    model answers as before, also while somebody's pages are embedded.

    Args:
        model: Loaded, for generation.
        folder (`str`): As [`read_folder`] takes it.

    Raises:
        OSError, ValueError: it is no retrieval folder, or belongs to another model.
    """
    found = read_folder(folder, base=model.name_or_path)
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    return JinaVLMEmbedder(twin, found.load_processor(), found.projector, {found.task: found.path})


@dataclass(eq=False)
class File:
    """
    What a user dropped.

    Args:
        path, name: Where it is, and what the user calls it.
        max_pixels: Of a PDF's page.
        pages: None while that is not known.
        error: Why none of it can be used.
        vectors: [tokens, width] of each page that was read, by its number from 1.
        errors: Of pages that cannot be used, by their numbers.
    """

    path: Path
    name: str
    max_pixels: int
    pages: int | None = None
    error: str = ""
    vectors: dict[int, torch.Tensor] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def next_page(self) -> int | None:
        """The first that was not tried."""
        tried = len(self.vectors) + len(self.errors)
        return tried + 1 if self.pages is not None and tried < self.pages else None

    @contextmanager
    def _open(self) -> Iterator[Document]:
        with _drawing:
            if not self.path.is_file():
                raise FileNotFoundError(f"{self.path} is no longer kept here. Drop it again.")
            with Document(self.path, self.max_pixels) as document:
                yield document

    def draw(self, page: int) -> Image.Image:
        """
        Raises:
            OSError, ValueError: it cannot be drawn, or is gone.
        """
        with self._open() as document:
            return document.draw(page)

    def count(self) -> None:
        """Find out how many pages it has, or why none can be used."""
        try:
            with self._open() as document:
                self.pages = document.pages
        except (OSError, ValueError) as error:
            self.error = self.say(error)

    def say(self, error: Exception) -> str:
        return without_folder(str(error) or type(error).__name__, str(self.path), self.name)


@dataclass(frozen=True)
class Hit:
    """A page that was found. `score`: how well a token of the question is matched, on the mean, from -1 to 1.
    `error`: why `heat_map` is None, and the page cannot be seen."""

    file: File
    page: int
    score: float
    heat_map: HeatMap | None
    error: str = ""

    def __str__(self) -> str:
        return f"{self.file.name}, page {self.page}" if self.file.pages > 1 else self.file.name


@dataclass
class Found:
    """At most [`TOP`] of the pages that were `searched`, the best one first. `chosen` is the one that is answered
    from, `word` the one of `words` that is shown on them, all where it is None."""

    question: str
    words: list[str]
    hits: list[Hit]
    searched: int
    seconds: float
    chosen: int = 0
    word: int | None = None


class Library:
    """
    Files of one user, in memory as long as the user has the page open; and what is being asked about them.

    Args:
        embedder: Shared with other users.
        model, processor: That answer, shared as well.
    """

    max_pages = MAX_PAGES

    def __init__(self, embedder: JinaVLMEmbedder, model, processor):
        self.embedder, self.model, self.processor = embedder, model, processor
        self.files: list[File] = []
        self.found: Found | None = None
        self.chat: ImageChat | None = None
        self.is_reading = False
        self._stopped, self._lock = threading.Event(), threading.Lock()

    # Reading

    @property
    def total(self) -> int:
        """Pages of all files, as far as they are known, and no more than are read."""
        return min(sum(file.pages or 0 for file in self.files), self.max_pages)

    @property
    def done(self) -> int:
        """Pages that were tried."""
        return sum(len(file.vectors) + len(file.errors) for file in self.files)

    @property
    def searched(self) -> int:
        return sum(len(file.vectors) for file in self.files)

    @property
    def is_stopped(self) -> bool:
        """Whether there is more to read, for [`read`]."""
        return not self.is_reading and self._next() is not None

    @property
    def left_out(self) -> list[File]:
        """Files of which pages are left out, as there are too many."""
        files = [file for file in self.files if not file.error and (file.pages is None or file.next_page)]
        return files if self.done >= self.max_pages else []

    def hold(self, uploads: list[tuple[str, str]]) -> None:
        """From here on these are the files, (path, name) each. Those that were there stay as they are."""
        with self._lock:
            known = {file.path: file for file in self.files}
            most = self.processor.image_processor.max_pixels
            files = {Path(path): known.get(Path(path)) or File(Path(path), name, most) for path, name in uploads}
            self.files = list(files.values())
        if self.found is not None and not all(hit.file in self.files for hit in self.found.hits):
            self.forget()

    def stop(self) -> None:
        """End reading, with the page that is being read. What was read stays."""
        self._stopped.set()

    def read(self) -> Iterator[None]:
        """Read what was not read yet, page by page; also what [`hold`] brings meanwhile. Nothing, while another thread
        does. Closing the iterator stops it.

        Raises:
            Exception: whatever the model failed with.
        """
        with self._lock:
            if self.is_reading:
                return
            self.is_reading = True
            self._stopped.clear()
        try:
            while (file := self._go_on()) is not None:
                if file.pages is None:
                    file.count()
                else:
                    self._read_page(file, file.next_page)
                yield
        finally:
            self.is_reading = False

    def _go_on(self) -> File | None:
        """The file to read from. None ends reading, at once: what comes now is for another to read."""
        with self._lock:
            file = None if self._stopped.is_set() else self._next()
            self.is_reading = file is not None
            return file

    def _next(self) -> File | None:
        files = [file for file in self.files if not file.error]
        if self.done >= self.max_pages:
            return None
        # All are counted first: so the end can be seen.
        return next((file for file in files if file.pages is None), None) or next(
            (file for file in files if file.next_page), None
        )

    def _read_page(self, file: File, page: int) -> None:
        try:
            image = file.draw(page)
            file.vectors[page] = self.embedder.embed([image], kind="multi").multi[0]
        except (OSError, ValueError) as error:
            file.errors[page] = file.say(error).removeprefix("Input 0: ")

    # Finding and answering

    def find(self, question: str) -> None:
        """Make `found` what matches a question best, among the pages that were read so far.

        Raises:
            ValueError: the question is empty or too long, or no page was read.
        """
        start = time.perf_counter()
        if not question.strip():
            raise ValueError("Write a question.")
        if len(question) > MAX_LENGTH:
            raise ValueError(f"A question may have {MAX_LENGTH:,} letters, this one has {len(question):,}.")
        pages = [(file, page, vectors) for file in self.files for page, vectors in list(file.vectors.items())]
        if not pages:
            raise ValueError("No page was read yet." if self.files else "Drop files first.")
        self.forget()
        asked = self.embedder.embed([question], role="query", kind="multi")
        scores = self.embedder.score(asked, Embeddings(multi=[vectors for _, _, vectors in pages]))[0]
        order = scores.argsort(descending=True, stable=True)[:TOP].tolist()
        hits = [self._show(*pages[index], float(scores[index]), question, asked.multi[0]) for index in order]
        words = next((hit.heat_map.words for hit in hits if hit.heat_map is not None), [])
        self.found = Found(question, words, hits, len(pages), time.perf_counter() - start)

    def _show(
        self, file: File, page: int, vectors: torch.Tensor, score: float, question: str, asked: torch.Tensor
    ) -> Hit:
        score /= len(asked)
        try:
            image = file.draw(page)
        except (OSError, ValueError) as error:
            return Hit(file, page, score, None, file.say(error))
        heat_map = compare(self.embedder, question, image, asked, vectors)
        shown = image.copy()
        shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        return Hit(file, page, score, dataclasses.replace(heat_map, image=shown))

    def choose(self, number: int) -> None:
        """Begin `chat`, a new one, in which the page with this number in `found` answers the question.

        Raises:
            ValueError: the page cannot be drawn.
        """
        self._end_chat()
        self.found.chosen = number
        hit = self.found.hits[number]
        try:
            image = hit.file.draw(hit.page)
        except (OSError, ValueError) as error:
            raise ValueError(hit.file.say(error)) from error
        chat = ImageChat(self.model, self.processor, image, self.processor.image_processor.max_tiles)
        chat.begin(self.found.question)
        self.chat = chat

    def forget(self) -> None:
        """Nothing is found, and nothing answered."""
        self._end_chat()
        self.found = None

    def _end_chat(self) -> None:
        if self.chat is not None:
            self.chat.close()
        self.chat = None

    def close(self) -> None:
        """End all that is being done."""
        self.stop()
        self.forget()
