"""The tab for searching: files in, pages that match a question out, with where they match, and an answer from one."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from jina_vlm_tools.retrieval.embedder import JinaVLMEmbedder

from .limits import AT_ONCE, MAX_NEW_TOKENS
from .question import add_question
from .search_examples import QUESTION, save_examples
from .searching import MAX_LENGTH, Library
from .showing import show_error
from .showing_search import (
    CLICKS,
    NOTHING_FOUND,
    NOTHING_READ,
    show_chosen,
    show_hits,
    show_reading,
    show_source,
    show_words,
)
from .wording import with_notes


CUT_OFF = "*Cut off: it was as long as answers here may be.*"

logger = logging.getLogger(__name__)


class SearchTab:
    """
    What the tab does with a model.

    Args:
        embedder: With the model's weights.
        model, processor: That answer, as in the chat.
    """

    def __init__(self, embedder: JinaVLMEmbedder, model, processor):
        self.embedder, self.model, self.processor = embedder, model, processor
        self.folder = tempfile.TemporaryDirectory(prefix="jina-vlm-examples-")
        self.examples = [str(path) for path in save_examples(Path(self.folder.name))]

    # Each function returns what the components are to show, by component: those it does not name stay.

    def take(self, uploads: list[dict] | None, library: Library | None) -> dict:
        """From here on these are the files."""
        library = library or Library(self.embedder, self.model, self.processor)
        library.hold(
            [(upload["path"], upload.get("orig_name") or Path(upload["path"]).name) for upload in uploads or []]
        )
        found = {} if library.found else self._found(library) | {self.answer: ""} | self._idle()
        return {self.library: library, self.alert: ""} | self._reading(library) | found

    def read(self, library: Library | None) -> Iterator[dict]:
        """Reads the files that [`take`] took, page by page."""
        if library is None:
            yield {self.alert: gr.skip()}
            return
        shown = {}
        try:
            for _ in library.read():
                yield self._reading(library)
        except Exception as error:
            logger.exception("Reading failed")
            shown = self._failed("Reading failed.", error)
        yield self._reading(library) | shown

    def stop_reading(self, library: Library | None) -> None:
        if library is not None:
            library.stop()

    def find(self, question: str, library: Library | None) -> dict:
        """Shows the pages that match, and begins an answer from the best one."""
        library = library or Library(self.embedder, self.model, self.processor)
        try:
            library.find(question.strip())
        except ValueError as error:
            return {self.library: library, self.alert: show_error("Not yet.", str(error))}
        except Exception as error:
            logger.exception("A search failed")
            return (
                {self.library: library, self.answer: ""}
                | self._idle()
                | self._found(library)
                | self._failed("This could not be searched.", error)
            )
        return {self.library: library, self.words: show_words(library.found)} | self._choose(library, 0)

    def pick(self, library: Library | None, event: gr.EventData) -> dict:
        """Shows where one word matched, or all."""
        found = library and library.found
        number = event.number
        if not found or not isinstance(number, int) or not -1 <= number < len(found.words):
            return {self.alert: gr.skip()}
        found.word = None if number == -1 else number
        return self._found(library)

    def choose(self, library: Library | None, event: gr.EventData) -> dict:
        """Begins an answer from another page."""
        found = library and library.found
        number = event.number
        if not found or not isinstance(number, int) or not 0 <= number < len(found.hits):
            return {self.alert: gr.skip()}
        return self._choose(library, number)

    def _choose(self, library: Library, number: int) -> dict:
        try:
            library.choose(number)
        except ValueError as error:
            shown = self._idle() | self._failed("This page cannot be read.", error)
        else:
            shown = {self.alert: "", self.send: gr.Button(visible=False), self.stop: gr.Button(visible=True)}
        return {self.answer: ""} | self._found(library) | shown

    def stream(self, library: Library | None) -> Iterator[dict]:
        """Streams the answer that was begun, if one was."""
        yield {self.alert: gr.skip()}  # of what yields nothing Gradio would empty all outputs
        chat = library and library.chat
        if not chat:
            return
        has_begun, shown = False, {}
        try:
            for turn in chat.stream(MAX_NEW_TOKENS, temperature=0):
                if chat.is_closed:
                    return
                has_begun = True
                yield {self.answer: with_notes(turn, CUT_OFF)}
        except Exception as error:
            if chat.is_closed:
                return
            logger.exception("An answer failed")
            has_begun, shown = True, {self.answer: ""} | self._failed("This could not be answered.", error)
        if has_begun and not chat.is_closed:
            yield shown | self._idle()

    def halt(self, library: Library | None) -> None:
        if library is not None and library.chat is not None:
            library.chat.stop()

    def _reading(self, library: Library) -> dict:
        return {
            self.reading: show_reading(library),
            self.end_reading: gr.Button(visible=library.is_reading),
            self.read_on: gr.Button(visible=library.is_stopped),
        }

    def _found(self, library: Library) -> dict:
        found = library.found
        return {
            self.words: show_words(found),
            self.hits: show_hits(found),
            self.chosen: show_chosen(found),
            self.source: show_source(found),
        }

    def _idle(self) -> dict:
        return {self.send: gr.Button(visible=True), self.stop: gr.Button(visible=False)}

    def _failed(self, what: str, error: Exception) -> dict:
        return {self.alert: show_error(what, str(error) or type(error).__name__)}

    def build(self) -> None:
        """The tab's components, where the caller is building a page."""
        self.library = gr.State(delete_callback=lambda library: library and library.close())
        self.alert = gr.HTML("", elem_id="search-alert", elem_classes="alert")
        with gr.Row(elem_id="shelf"):
            with gr.Column(scale=4, min_width=320):
                self.files = gr.File(
                    label="Images and PDFs",
                    file_count="multiple",
                    height=170,
                    elem_id="files",
                )
            with gr.Column(scale=6, min_width=320):
                with gr.Row(elem_id="search", elem_classes="line", equal_height=True):
                    self.question, self.send, self.stop = add_question(
                        "Search",
                        "What do you want to know from these pages?",
                        "Question about the pages",
                        prefix="search-",
                        max_length=MAX_LENGTH,
                    )
                with gr.Row(elem_id="progress", equal_height=True):
                    self.reading = gr.HTML(NOTHING_READ, elem_id="reading")
                    self.end_reading = gr.Button("Stop reading", size="sm", visible=False, elem_id="end-reading")
                    self.read_on = gr.Button("Read on", size="sm", visible=False, elem_id="read-on")
                    example = gr.Button("Try drawn pages", size="sm", elem_id="search-example")
        self.words = gr.HTML("", elem_id="words", js_on_load=CLICKS)
        self.hits = gr.HTML(NOTHING_FOUND, elem_id="hits", js_on_load=CLICKS)
        with gr.Row(elem_id="found"):
            with gr.Column(scale=5, min_width=320):
                self.chosen = gr.HTML("", elem_id="chosen")
            with gr.Column(scale=5, min_width=320):
                self.source = gr.HTML("", elem_id="source")
                self.answer = gr.Markdown("", elem_id="answer")

        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        queued = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": AT_ONCE}
        result = [self.hits, self.words, self.chosen, self.source, self.answer, self.alert, self.send, self.stop]
        progress = [self.reading, self.end_reading, self.read_on, self.alert]
        taking = {"fn": self.take, "inputs": [self.files, self.library], "preprocess": False, **quick}
        taking["outputs"] = [self.library, *progress, *(one for one in result if one is not self.alert)]
        reading = {"fn": self.read, "inputs": self.library, "outputs": progress, "concurrency_id": "read", **queued}
        streaming = {
            "fn": self.stream,
            "inputs": self.library,
            "outputs": result,
            "concurrency_id": "answer",
            **queued,
        }
        # Unprocessed: the component would make a file of its own for each.
        taken = gr.on([self.files.upload, self.files.delete, self.files.clear], **taking)
        shown = example.click(lambda: (self.examples, QUESTION), None, [self.files, self.question], **quick)
        for files in (taken, shown.then(**taking)):
            files.then(**reading)
        self.read_on.click(**reading)
        self.end_reading.click(self.stop_reading, self.library, None, **quick)
        asked = gr.on(
            [self.send.click, self.question.submit],
            self.find,
            [self.question, self.library],
            [self.library, *result],
            concurrency_id="search",
            **(queued | {"show_progress": "minimal", "show_progress_on": self.hits}),
        )
        chosen = self.hits.click(self.choose, self.library, result, **quick)
        for page in (asked, chosen):
            page.then(**streaming)
        self.words.click(self.pick, self.library, result, **quick)
        self.stop.click(self.halt, self.library, None, **quick)
