"""The page itself: what is where, and what happens when. One image at a time: a new one begins a new chat, as all
answers are about the image that is seen beside them."""

import html
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from jina_vlm_tools.inference.loading import load_image
from jina_vlm_tools.inference.tiling import compute_tiling

from .answering import ImageChat
from .examples import EXAMPLES
from .limits import AT_ONCE, MAX_NEW_TOKENS
from .question import add_question
from .showing import NO_TILING, NO_TURN, show_error, show_tiling, show_turn
from .wording import text_of, with_notes, without_folder


if TYPE_CHECKING:
    from .search_tab import SearchTab

UPLOADS_KEPT_SECONDS = 3600
MAX_FILE_SIZE = "64mb"
SHOWN_SIDE = 1280  # pixels of the image as the page shows it
STYLE = Path(__file__).parent / "style.css"
# The system's own fonts: nothing is fetched from elsewhere.
THEME = gr.themes.Soft(
    primary_hue="blue",
    secondary_hue="blue",
    neutral_hue="slate",
    radius_size="lg",
    font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)

logger = logging.getLogger(__name__)


class Page:
    """
    What the page does with a model.

    Args:
        model, processor: Of one checkpoint; all users share them.
        name (`str`): Of the checkpoint, for the page's head.
        note (`str`, *optional*): What users should know about it.
        search ([`SearchTab`], *optional*): Shown beside the chat.
    """

    def __init__(self, model, processor, name: str, note: str = "", search: "SearchTab | None" = None):
        self.model, self.processor, self.name, self.note, self.search = model, processor, name, note, search
        self.folder = tempfile.TemporaryDirectory(prefix="jina-vlm-examples-")
        self.examples = [(example.save(Path(self.folder.name)), example.question) for example in EXAMPLES]

    # Each function returns what the components are to show, by component: those it does not name stay.

    def take(self, upload: dict, max_tiles: int, chat: ImageChat | None) -> dict:
        """A new image begins a new chat. What cannot be used is said, and leaves nothing behind."""
        return self._take(upload["path"], upload.get("orig_name") or "", max_tiles, chat)

    def take_away(self, chat: ImageChat | None) -> dict:
        """As [`clear`], of an image that the browser has taken away by itself. The next one may be there by now."""
        cleared = self.clear(chat)
        del cleared[self.image]
        return cleared

    def take_example(self, index: int, max_tiles: int, chat: ImageChat | None) -> dict:
        path, question = self.examples[index]
        return self._take(str(path), path.name, max_tiles, chat) | {self.question: question}

    def _take(self, path: str, name: str, max_tiles: int, chat: ImageChat | None) -> dict:
        cleared = self.clear(chat)
        try:
            image = load_image(path, self.processor.image_processor)
            return cleared | self._show(ImageChat(self.model, self.processor, image, max_tiles))
        except (OSError, ValueError) as error:
            return cleared | {
                self.alert: show_error("This image cannot be used.", without_folder(str(error), path, name))
            }

    def _show(self, chat: ImageChat) -> dict:
        shown = chat.image.copy()
        shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        tiling = compute_tiling(chat.image, self.processor.image_processor, **chat.settings)
        return {self.chat: chat, self.image: shown, self.tiling: show_tiling(tiling)}

    def retile(self, max_tiles: int, chat: ImageChat | None) -> dict:
        """Another number of tiles: the same image, seen otherwise, in a new chat."""
        cleared = self.clear(chat)
        return cleared | self._show(ImageChat(self.model, self.processor, chat.image, max_tiles)) if chat else cleared

    def clear(self, chat: ImageChat | None) -> dict:
        if chat is not None:
            chat.close()
        return {
            self.chat: None,
            self.image: None,
            self.chatbot: [],
            self.tiling: NO_TILING,
            self.turn: NO_TURN,
            self.alert: "",
            self.send: gr.Button(visible=True),
            self.stop: gr.Button(visible=False),
        }

    def ask(self, question: str, history: list[dict], chat: ImageChat | None) -> dict:
        """Puts the question into the chat, at once, whoever else is being answered."""
        question = question.strip()
        if chat is None or not question:
            return {
                self.alert: show_error("Not yet.", "Choose an image first." if chat is None else "Write a question.")
            }
        if not chat.begin(question):
            return {self.alert: ""}
        return {
            self.question: "",
            self.alert: "",
            self.turn: NO_TURN,
            self.chatbot: [*history, {"role": "user", "content": html.escape(question, quote=False)}],
            self.send: gr.Button(visible=False),
            self.stop: gr.Button(visible=True),
        }

    def answer(
        self, history: list[dict], max_new_tokens: int, temperature: float, chat: ImageChat | None
    ) -> Iterator[dict]:
        """Streams the answer to what [`ask`] took, if it took something."""
        yield {self.alert: gr.skip()}  # of what yields nothing Gradio would empty all outputs
        if chat is None:
            return
        shown = {}
        try:
            for turn in chat.stream(max_new_tokens, temperature):
                if chat.is_closed:
                    return
                text = with_notes(turn)
                shown = {self.turn: show_turn(turn)}
                yield shown | ({self.chatbot: [*history, {"role": "assistant", "content": text}]} if text else {})
        except Exception as error:
            if chat.is_closed:
                return
            logger.exception("An answer failed")
            shown = {
                self.alert: show_error("This could not be answered.", str(error) or type(error).__name__),
                self.chatbot: history[:-1],
                self.question: html.unescape(text_of(history[-1])),  # to be sent again
            }
        if shown:
            yield shown | {self.send: gr.Button(visible=True), self.stop: gr.Button(visible=False)}

    def halt(self, chat: ImageChat | None) -> None:
        if chat is not None:
            chat.stop()

    def build(self) -> gr.Blocks:
        """The page, to be launched with [`launch_arguments`]."""
        with gr.Blocks(
            title="jina-vlm", analytics_enabled=False, delete_cache=(UPLOADS_KEPT_SECONDS, UPLOADS_KEPT_SECONDS)
        ) as blocks:
            gr.HTML(self._head(), elem_id="head")
            if self.search is None:
                self._build_chat()
            else:
                with gr.Tabs(elem_id="tabs"):
                    with gr.Tab("Chat", id="chat"):
                        self._build_chat()
                    with gr.Tab("Search", id="search"):
                        self.search.build()
        return blocks

    def _build_chat(self) -> None:
        self.chat = gr.State()
        self.alert = gr.HTML("", elem_id="alert", elem_classes="alert")
        with gr.Row(elem_id="talk"):
            with gr.Column(scale=4, min_width=320):
                self.image = gr.Image(
                    label="Image",
                    sources=["upload", "clipboard"],
                    buttons=["fullscreen"],
                    height=320,
                    elem_id="image",
                    placeholder="Drop an image here, or click to choose one",
                )
                samples = gr.Dataset(
                    label="Or begin with one of these",
                    components=[gr.Image(visible=False), gr.Textbox(visible=False)],
                    samples=[[str(path), question] for path, question in self.examples],
                    type="index",
                    elem_id="examples",
                )
            with gr.Column(scale=6, min_width=320):
                self.chatbot = gr.Chatbot(
                    label="Chat",
                    height=430,
                    buttons=[],
                    elem_id="chat",
                    feedback_options=None,
                    placeholder=(
                        "### Ask about the image\n"
                        "The answer appears here, word by word. Ask on: the chat is remembered."
                    ),
                )
                with gr.Row(elem_id="ask", elem_classes="line", equal_height=True):
                    self.question, self.send, self.stop = add_question(
                        "Ask", "What do you want to know?", "Question", autofocus=True
                    )
                    clear = gr.Button("Clear", scale=1, min_width=84, elem_id="clear")
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    max_tiles = gr.Slider(
                        1,
                        12,
                        min(12, self.processor.image_processor.max_tiles),
                        step=1,
                        label="Most tiles",
                        info="More see smaller print, fewer are faster. Another number begins a new chat.",
                        elem_id="max-tiles",
                    )
                    max_new_tokens = gr.Slider(
                        1,
                        1024,
                        MAX_NEW_TOKENS,
                        step=1,
                        label="Longest answer",
                        info="In tokens.",
                        elem_id="max-new-tokens",
                    )
                    temperature = gr.Slider(
                        0,
                        2,
                        0,
                        step=0.1,
                        label="Temperature",
                        info="0 gives the likeliest answer, always the same.",
                        elem_id="temperature",
                    )
        with gr.Row(elem_id="seen"), gr.Column():
            gr.HTML("<h2>How long it took</h2>")
            self.turn = gr.HTML(NO_TURN, elem_id="turn")
            gr.HTML("<h2>How the model sees the image</h2>")
            self.tiling = gr.HTML(NO_TILING, elem_id="tiling")

        seen = [self.chat, self.image, self.chatbot, self.tiling, self.turn, self.alert, self.send, self.stop]
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        asking = {"fn": self.ask, "inputs": [self.question, self.chatbot, self.chat], **quick}
        asking["outputs"] = [self.question, self.chatbot, self.alert, self.turn, self.send, self.stop]
        answering = {
            "fn": self.answer,
            "inputs": [self.chatbot, max_new_tokens, temperature, self.chat],
            "outputs": [self.chatbot, self.turn, self.alert, self.question, self.send, self.stop],
            "concurrency_limit": AT_ONCE,
            "concurrency_id": "answer",
            "show_progress": "minimal",
            "show_progress_on": self.turn,
            "api_visibility": "private",
        }
        # Unprocessed: the component would open the image by itself, and fail in its own words.
        self.image.upload(self.take, [self.image, max_tiles, self.chat], seen, preprocess=False, **quick)
        self.image.clear(self.take_away, self.chat, seen, **quick)
        for clearing in (clear.click, self.chatbot.clear):
            clearing(self.clear, self.chat, seen, **quick).then(lambda: "", None, self.question, **quick)
        max_tiles.release(self.retile, [max_tiles, self.chat], seen, **quick)
        chosen = samples.click(self.take_example, [samples, max_tiles, self.chat], [*seen, self.question], **quick)
        asked = (gr.on([self.send.click, self.question.submit], **asking), chosen.then(**asking))
        answered = [question.then(**answering) for question in asked]
        self.stop.click(self.halt, self.chat, None, **quick)
        # The browser shows nothing more of an answer in a chat that has ended.
        ending = [
            clear.click,
            self.chatbot.clear,
            self.image.upload,
            self.image.clear,
            max_tiles.release,
            samples.click,
        ]
        gr.on(ending, None, None, None, cancels=answered, **quick)

    def _head(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        facts = f"{self.model.num_parameters():,} parameters · {self.model.device} · {dtype}"
        return (
            "<header><h1>jina-vlm</h1><p>Show an image, ask about it.</p>"
            f'<p class="quiet"><b>{self.name}</b> · {facts}</p></header>'
            + (f'<p class="note">{self.note}</p>' if self.note else "")
        )


def launch_arguments() -> dict:
    """What [`Page.build`]'s page needs when it is launched."""
    return {
        "theme": THEME,
        "css_paths": STYLE,
        "max_file_size": MAX_FILE_SIZE,
        "footer_links": [],
        "ssr_mode": False,
        "show_error": True,
    }
