"""`transformers serve`, for jina-vlm: `jina-vlm serve checkpoints/tiny --port 8000`.

The server and its options (`--help`) are the library's own. It knows only architectures that come with the library, so
that before it starts this module enters ours where it looks, and registers a processor that answers bad requests over
HTTP. Needs `pip install ".[serve]"`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jina_vlm
import typer
from jina_vlm.image_loading_jina_vlm import is_url
from jinja2 import TemplateError
from transformers import AutoProcessor
from transformers.cli.serve import Serve
from transformers.cli.serving.utils import BaseHandler
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from jina_vlm_tools.engines.graph_model import OnnxForConditionalGeneration, OpenVinoForConditionalGeneration
from jina_vlm_tools.engines.llama_cpp import LlamaCppForConditionalGeneration


@contextmanager
def refusing() -> Iterator[None]:
    """Refuse a request by 400, whose `detail` is the message of the error that it led to."""
    from fastapi import HTTPException  # not needed for the server's help

    try:
        yield
    except (ValueError, TypeError, OSError, TemplateError) as error:
        raise HTTPException(status_code=400, detail=str(error)) from error


class JinaVLMProcessor(jina_vlm.JinaVLMProcessor):  # by this name checkpoints ask for it
    """The processor of requests over HTTP.

    The server calls it before it queues a request or begins a stream, so that here is the place to refuse one. Any
    other error than an `HTTPException` becomes a bare "500 Internal Server Error", which clients retry, and which
    closes the connection under the client's next request.
    """

    def apply_chat_template(self, conversation: list[dict], *args, **kwargs):
        """As the base class, for text and images from the network alone.

        Raises:
            fastapi.HTTPException: 400, whose `detail` is the message of the error that the base class raised.
        """
        with refusing():
            _check(conversation)
            return super().apply_chat_template(conversation, *args, **kwargs)


TEXTS, IMAGES = ("text", "input_text", "output_text"), ("image_url", "input_image")  # parts, by OpenAI's names


def check_messages(messages: Any) -> None:
    """Refuse messages that the library's server would leave parts of out, or fail at.

    Raises:
        ValueError: they are not as OpenAI's API has them, or show something else than text and images.
    """
    if not isinstance(messages, list):
        raise ValueError(f"`messages` is {str(messages)[:80]!r}, expected a list.")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"A message is {str(message)[:80]!r}, expected one with a `role` and `content`.")
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        for part in content if isinstance(content, list) else [content]:
            kind = part.get("type") if isinstance(part, dict) else None
            url = part.get("image_url") if kind in IMAGES else None
            url = url.get("url") if isinstance(url, dict) else url
            if not (isinstance(url, str) if kind in IMAGES else kind in TEXTS and isinstance(part.get("text"), str)):
                raise ValueError(
                    f"jina-vlm takes text and images. A message has the part {str(part)[:80]!r}, expected "
                    '{"type": "text", "text": "..."} or {"type": "image_url", "image_url": {"url": "..."}}.'
                )


def _check(conversation: list[dict]) -> None:
    """Refuses what the library would open before the base class sees it, and what opens the server's own files."""
    if not conversation:
        raise ValueError("Expected at least one message, got none.")
    for part in (part for message in conversation for part in message["content"]):
        if part["type"] == "image" and not is_url(str(part["url"])):
            raise ValueError(f"Expected an image's http(s) URL or data URI, got {str(part['url'])[:80]!r}.")


def register() -> None:
    """Makes jina-vlm known to the library's server, and the server strict about messages. There is no public way into
    its table of models, which are the library's own, nor to what it makes of messages, whose parts it leaves out where
    it does not know them."""
    for model_class in (
        jina_vlm.JinaVLMForConditionalGeneration,
        LlamaCppForConditionalGeneration,
        OnnxForConditionalGeneration,
        OpenVinoForConditionalGeneration,
    ):
        config_class = model_class.config_class
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[config_class.model_type] = model_class.__name__
        AutoProcessor.register(config_class, JinaVLMProcessor, exist_ok=True)
    take_messages = BaseHandler.get_processor_inputs_from_messages

    def take_checked(messages: Any, *args) -> list[dict]:
        with refusing():
            check_messages(messages)
        return take_messages(messages, *args)

    BaseHandler.get_processor_inputs_from_messages = staticmethod(take_checked)


def serve(arguments: list[str]) -> None:
    """Run the library's server with its own command-line arguments."""
    register()
    app = typer.Typer(add_completion=False)
    app.command()(Serve)
    app(arguments, prog_name="jina-vlm serve")
