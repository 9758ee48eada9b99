"""`ask`: questions about images, or about none."""

import argparse
import json
import mimetypes
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from jina_vlm_tools import sources
from jina_vlm_tools.engines import TORCH, check_engine, find_engine

from . import options
from .progress import Progress
from .search import Searcher, add_way, describe
from .steps import load_processor


USAGE = (
    "jina-vlm ask [IMAGE ...] QUESTION [options]\n       jina-vlm ask [IMAGE ...] -p PROMPT [-p PROMPT ...] [options]"
    "\n       jina-vlm ask --index INDEX QUESTION [options]"
)
DESCRIPTION = """\
Ask a question about one image, several, or none. The answer is printed while
it is generated. Several prompts are asked apart, each about all images; with
--map, each about each image; an image that cannot be opened is named, and
the others are asked about.

With --index, the page that fits the question is found among those of a folder
(`jina-vlm index`), named, and asked about, by the same weights.

Images are cut into tiles at their own size, as by the release's own command,
unless --max-pixels says what to fit them to first.
"""
EXAMPLES = """\
examples:
  jina-vlm ask photo.png "What is in the image?"
  jina-vlm ask "What is the capital of France?"
  jina-vlm ask before.png after.png "What has changed?" --max-tiles 4
  jina-vlm ask "scans/*.png" --map -p "Who wrote this?" -p "When?" --json
  jina-vlm ask a.png b.png "How does Image 2 differ from Image 1?" --image-labels
  jina-vlm ask photo.png "What does the sign say?" --max-pixels 4000000
  curl -s https://example.com/photo.jpg | jina-vlm ask - "Who painted this?"
  jina-vlm ask --index papers "Which pump was replaced in May?"
  jina-vlm ask --json scan.png "What is the total?" | jq -r .answer
  jina-vlm ask photo.png "What is this?" --model for-llama --engine llama.cpp
"""
SHOWN = 200  # characters of a URL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = USAGE
    parser.add_argument(
        "words",
        metavar="IMAGE ... QUESTION",
        nargs="*",
        help='images: paths, http(s) URLs, data URIs, patterns such as "photos/*.png", or - for stdin; '
        "then what to ask, quoted, unless --prompt says it",
    )
    parser.add_argument("-i", "--image", action="append", default=[], help="another way to name an image; repeatable")
    parser.add_argument(
        "-p", "--prompt", action="append", default=[], help="another way to name a question; repeatable"
    )
    parser.add_argument("--map", action="store_true", help="ask about each image alone, not about all together")
    parser.add_argument("--prompt-first", action="store_true", help="write the prompt before the images, not after")
    parser.add_argument(
        "--image-labels", action="store_true", help='write "Image 1:", "Image 2:" ... before the images'
    )
    parser.add_argument(
        "--max-pixels",
        type=options.positive,
        metavar="N",
        help="fit an image to at most so many pixels before its tiles are chosen (default: no fit; the other verbs "
        "fit to 1,003,520)",
    )
    parser.add_argument(
        "--index",
        type=Path,
        metavar="INDEX",
        help="ask about the pages of this index, or folder that was indexed, that fit best; --model is then what made "
        "it, and need not be named",
    )
    parser.add_argument(
        "--top", type=options.positive, metavar="N", help="with --index: about so many pages together (default: 1)"
    )
    add_way(parser)
    options.add_store(parser)
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print answers piece by piece, as they are generated (default, but with --json), or each as a whole",
    )
    options.add_model_options(parser, max_new_tokens=1024)
    options.add_json(parser, "one JSON object for each answer (answer, tokens, tiles of each image, seconds)")
    parser.set_defaults(run=run, check=check)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What is an image and what a question, and which options belong together; ends the process with a usage error."""
    words = args.words
    if not args.prompt:
        if not words:
            parser.error('say what to ask: jina-vlm ask [IMAGE ...] "QUESTION"')
        *words, question = words
        if names_image(question):
            parser.error(f'{question} is an image. Say what to ask about it, last: jina-vlm ask IMAGE "QUESTION"')
        args.prompt = [question]
    if not all(prompt.strip() for prompt in args.prompt):
        parser.error("a question is empty. Say what to ask")
    if words and args.image:
        parser.error(f"images are named in two ways, {words[0]} and --image {args.image[0]}: take one of them")
    args.image = args.image or words
    if args.index and args.image:
        parser.error(f"--index finds what to ask about, and {args.image[0]} names it: take one of them")
    if args.index and args.engine not in (None, TORCH):
        parser.error(f"--index finds and answers by torch: leave --engine {args.engine}, or --index")
    if args.index and args.map:
        parser.error("--map asks about each image that is named, and --index finds them: leave one of them")
    if not args.index:
        for option in ("top", "way", "candidates", "store"):
            if getattr(args, option):
                parser.error(f"--{option} is about an index: name one by --index, or leave it")
    if not args.image and not args.index:
        for option in ("map", "prompt_first", "image_labels", "max_tiles", "max_pixels"):
            if getattr(args, option):
                parser.error(f"--{option.replace('_', '-')} is about images, and none is named: name one, or leave it")
    if args.map and args.image_labels:
        parser.error("--image-labels tells images apart that are shown together: leave it, or --map")
    if args.index and args.model == parser.get_default("model"):
        args.model = None  # the index's
    if args.json and args.stream:
        parser.error("--json prints answers as a whole: leave --stream, or --json")


def names_image(text: str) -> bool:
    """Whether somebody who writes this has forgotten the question."""
    has_ending = (mimetypes.guess_type(text)[0] or "").startswith("image/")
    is_name = len(text.split()) == 1 and (has_ending or sources.is_url(text))
    return text == sources.STDIN or is_name or os.path.isfile(text)


def run(args: argparse.Namespace) -> None:
    if args.index:
        return answer_from_index(args)
    from jina_vlm_tools.inference.asking import find_images

    sources.check_model(args.model)
    check_engine(args.model, args.engine)
    images = find_images(args.image)
    shown_together = [[image] for image in images] if args.map else [images]
    has_one_answer = len(shown_together) * len(args.prompt) == 1
    started, progress = time.perf_counter(), Progress()
    processor, load_model = load_processor(args.model, progress)
    from jina_vlm_tools.inference.conversation import Conversation, describe_images
    from jina_vlm_tools.inference.loading import load_image, load_on_device

    settings = image_settings(args)
    conversation, failed = None, 0
    for paths in shown_together:
        names = [shorten(path) for path in paths]
        try:
            with progress.step("image", "Opening the image") if paths else nullcontext():
                opened = [load_image(path, processor.image_processor) for path in paths]
                described = describe_images(processor, opened, **settings)
        except (OSError, ValueError) as error:
            if len(shown_together) == 1:
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        for prompt in args.prompt:
            if conversation is None:
                options.note_tiny(args.model, progress)
                with progress.step("model", "Loading the model"):
                    model = load_on_device(load_model, args.device, args.dtype)
                conversation = Conversation(model, processor, args.max_new_tokens, **settings)
            conversation.begin_anew()
            heading = None if has_one_answer else f"{', '.join(names)}: {prompt}" if names else prompt
            named = [{"name": name, **facts} for name, facts in zip(names, described, strict=True)]
            answer(args, conversation, prompt, opened, named, heading, started, progress)
        conversation.reset()  # other images of the same size have the same ids
    if failed:
        raise ValueError(
            f"{failed} of {len(shown_together)} images could not be asked about; what is wrong is said above."
        )


def image_settings(args: argparse.Namespace) -> dict:
    """As the release's own command: no fit, unless it is told what to fit to."""
    return {"max_tiles": args.max_tiles, "do_resize": args.max_pixels is not None, "max_pixels": args.max_pixels}


def answer_from_index(args: argparse.Namespace) -> None:
    """As [`run`], about the pages that fit each prompt."""
    started, progress = time.perf_counter(), Progress()
    searcher = Searcher(args.index, args, progress, "ask --index")
    from jina_vlm_tools.inference.conversation import Conversation, describe_images

    args.model, top = searcher.model, args.top or 1
    settings = image_settings(args)
    embedder = searcher.embedder
    conversation = Conversation(embedder.model, embedder.answering_processor, args.max_new_tokens, **settings)
    images = embedder.answering_processor.image_processor
    finest = 4 * (args.max_tiles or images.max_tiles) * images.tile_size**2  # more than its tiles can show
    for prompt in args.prompt:
        with progress.step("search", f"Searching {len(searcher.index):,} pages"):
            found = searcher.search(prompt, top)
        if not found:
            raise ValueError(f"{args.index} has no pages: there is nothing to answer from.")
        with progress.step("image", "Drawing the page" if top == 1 else "Drawing the pages"):
            opened = [searcher.draw(one.page, finest) for one in found]
            described = describe_images(conversation.processor, opened, **settings)
        tokens, most = sum(facts["tokens"] for facts in described), conversation.processor.tokenizer.model_max_length
        if len(found) > 1 and tokens > most:
            raise ValueError(
                f"{len(found)} pages have {tokens:,} tokens, the model takes {most:,}. Ask about fewer (--top N) or "
                "of fewer tiles each (--max-tiles N)."
            )
        names = [str(one.page) for one in found]
        heading = "; ".join(names) + (f": {prompt}" if len(args.prompt) > 1 else "")
        named = [
            {"name": name, **describe(searcher, rank, one), **facts}
            for rank, (name, one, facts) in enumerate(zip(names, found, described, strict=True), 1)
        ]
        conversation.reset()
        answer(args, conversation, prompt, opened, named, heading, started, progress)


def answer(
    args: argparse.Namespace, conversation, prompt: str, opened: list, images: list[dict], heading: str | None,
    started: float, progress: Progress,
) -> None:  # fmt: skip
    """Ask, and print the answer as was wished. `images`: what is known of each that is opened."""
    from jina_vlm_tools.inference.asking import make_content

    is_streamed = not args.json and args.stream is not False
    with progress.step("tokens", "Making tiles and tokens"):
        inputs = conversation.prepare_turn(make_content(prompt, opened, args.prompt_first, args.image_labels))
    if heading and not args.json:
        print(heading, flush=True)
    answered = conversation.generate(inputs, show if is_streamed else (lambda text: None))
    seconds = {
        **progress.seconds,
        "first_token": answered.seconds_to_first_token,
        "answer": answered.seconds,
        "total": round(time.perf_counter() - started, 3),
    }
    if args.json:
        line = report(args.model, conversation.model, prompt, images, answered, seconds)
        print(json.dumps(line, ensure_ascii=False), flush=True)
        return
    is_one = heading is None or (args.index and len(args.prompt) == 1)
    print("" if is_streamed else answered.text, end="\n" if is_one else "\n\n", flush=True)
    progress.say(count(images, answered, seconds))
    if answered.is_cut_off:
        progress.say("The answer is cut off: raise --max-new-tokens.")


def report(checkpoint: str, model, prompt: str, images: list[dict], answer, seconds: dict) -> dict:
    """An answer and all that is known of it, for JSON."""
    return {
        "answer": answer.text,
        "is_cut_off": answer.is_cut_off,
        "question": prompt,
        "model": checkpoint,
        "engine": find_engine(checkpoint),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "images": images,
        "tokens": {"prompt": answer.prompt_tokens, "answer": answer.tokens},
        "seconds": seconds,
    }


def count(images: list[dict], answer, seconds: dict) -> str:
    """Tokens and time of an answer, for people."""
    of_images = sum(image["tokens"] for image in images)
    return (
        f"{answer.prompt_tokens} tokens in, {of_images} of them for images; {answer.tokens} out, the first after "
        f"{seconds['first_token']:.2f} s, all after {seconds['answer']:.2f} s; {seconds['total']:.1f} s in all."
    )


def show(text: str) -> None:
    print(text, end="", flush=True)


def shorten(name: str) -> str:
    """A path as it is; a URL that holds an image is longer than anybody reads."""
    return name if len(name) <= SHOWN or not sources.is_url(name) else f"{name[:SHOWN]}..."
