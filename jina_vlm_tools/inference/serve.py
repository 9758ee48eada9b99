"""`transformers serve`, for jina-vlm: `jina-vlm serve checkpoints/tiny --port 8000`.

The server and its options (`--help`) are the library's own. It knows only architectures that come with the library, so
that before it starts this module enters ours where it looks, and registers a processor that answers bad requests over
HTTP. Needs `pip install "jina-vlm-transformers[serve]"`.
"""

import jina_vlm
import typer
from jina_vlm.image_loading_jina_vlm import is_url
from jinja2 import TemplateError
from transformers import AutoProcessor
from transformers.cli.serve import Serve
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES


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
        from fastapi import HTTPException  # not needed for the server's help

        try:
            _check(conversation)
            return super().apply_chat_template(conversation, *args, **kwargs)
        except (ValueError, TypeError, OSError, TemplateError) as error:
            raise HTTPException(status_code=400, detail=str(error)) from error


def _check(conversation: list[dict]) -> None:
    """Refuses what the library would open before the base class sees it, and what opens the server's own files."""
    if not conversation:
        raise ValueError("Expected at least one message, got none.")
    for part in (part for message in conversation for part in message["content"]):
        if part["type"] not in ("text", "image"):
            raise ValueError(f"jina-vlm takes text and images, got {part['type']}.")
        if part["type"] == "image" and not is_url(str(part["url"])):
            raise ValueError(f"Expected an image's http(s) URL or data URI, got {str(part['url'])[:80]!r}.")


def register() -> None:
    """Makes jina-vlm known to the library's server. The server reads the names of the library's own models: there is
    no public way into that table."""
    model_class = jina_vlm.JinaVLMForConditionalGeneration
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[jina_vlm.JinaVLMConfig.model_type] = model_class.__name__
    AutoProcessor.register(jina_vlm.JinaVLMConfig, JinaVLMProcessor, exist_ok=True)


def serve(arguments: list[str]) -> None:
    """Run the library's server with its own command-line arguments."""
    register()
    app = typer.Typer(add_completion=False)
    app.command()(Serve)
    app(arguments, prog_name="jina-vlm serve")
