"""`chat`: a conversation, turn by turn."""

import argparse
import json
import sys

from jina_vlm_tools import sources
from jina_vlm_tools.engines import check_engine

from . import options
from .ask import show
from .progress import Progress
from .steps import load_processor


DESCRIPTION = """\
Talk with the model about images, a line for each turn. The conversation is
remembered: each turn goes on from the last, and no image is encoded twice.

  /image PATH   show an image (a path, URL or data URI) with the next question
  /reset        forget the conversation and its images
  /quit         end; so does the end of the input (Ctrl-D)

Questions may come from a pipe. Then the first error ends the chat.
"""
EXAMPLES = """\
examples:
  jina-vlm chat photo.png
  printf 'What is this?\\nHow many stars are there?\\n' | jina-vlm chat photo.png --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="*",
        help="shown with the first question: a path, an http(s) URL or a data URI",
    )
    options.add_model_options(parser)
    options.add_json(parser, "one JSON object for each answer (answer, tokens, tiles of new images, seconds)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    sources.check_model(args.model)
    check_engine(args.model, args.engine)
    sources.check_images(args.images)
    if sources.STDIN in args.images:
        raise ValueError("In a chat stdin brings the questions. Name the image by its path.")
    progress = Progress()
    processor, load_model = load_processor(args.model, progress)
    from jina_vlm_tools.inference.conversation import Conversation
    from jina_vlm_tools.inference.loading import load_on_device

    images = [open_checked(source, processor, max_tiles=args.max_tiles) for source in args.images]
    options.note_tiny(args.model, progress)
    with progress.step("model", "Loading the model"):
        model = load_on_device(load_model, args.device, args.dtype)

    conversation = Conversation(model, processor, args.max_new_tokens, max_tiles=args.max_tiles)
    is_interactive = sys.stdin.isatty()
    prompt = "> " if is_interactive and sys.stdout.isatty() else ""
    while (line := read(prompt)) not in (None, "/quit"):
        try:
            images = take(line, conversation, images, args.json)
        except (OSError, ValueError) as error:
            if not is_interactive or isinstance(error, BrokenPipeError):
                raise
            print(f"error: {error}", file=sys.stderr)


def read(prompt: str) -> str | None:
    """The next line; none at the end."""
    try:
        return input(prompt).strip()
    except EOFError:
        return None


def open_checked(source: str, processor, **settings):
    """An image that a conversation can take: one that makes no tiles would stand in the way of every question.

    Raises:
        OSError, ValueError: it cannot be opened, or makes no tiles; the message names it.
    """
    from jina_vlm_tools.inference.conversation import describe_images
    from jina_vlm_tools.inference.loading import load_image

    image = load_image(source, processor.image_processor)
    try:
        describe_images(processor, [image], **settings)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return image


def take(line: str, conversation, images: list, as_json: bool) -> list:
    """Does what a line says. `images` wait for the next question; returns those that wait now."""
    from jina_vlm_tools.inference.conversation import describe_images

    command, _, argument = line.partition(" ")
    if command == "/image":
        source = argument.strip()
        if source == sources.STDIN:
            raise ValueError("In a chat stdin brings the questions. Name the image by its path.")
        if not source:
            raise ValueError("Say which image: /image PATH.")
        sources.check_image(source)
        return [*images, open_checked(source, conversation.processor, **conversation.settings)]
    if command == "/reset":
        conversation.reset()
        return []
    if command.startswith("/"):
        raise ValueError(
            f"{command}: no such command. There are /image PATH, /reset and /quit; "
            "a question begins with another character."
        )
    if line:
        answer = conversation.answer(line, images, (lambda text: None) if as_json else show)
        if as_json:
            report = {
                "answer": answer.text,
                "is_cut_off": answer.is_cut_off,
                "question": line,
                "images": describe_images(conversation.processor, images, **conversation.settings),
                "tokens": {"prompt": answer.prompt_tokens, "answer": answer.tokens},
                "seconds": {"first_token": answer.seconds_to_first_token, "answer": answer.seconds},
            }
            print(json.dumps(report, ensure_ascii=False), flush=True)
        else:
            print(flush=True)
        return []
    return images
