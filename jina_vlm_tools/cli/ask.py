"""`ask`: one question about images."""

import argparse
import json
import time

from . import options
from .progress import Progress


DESCRIPTION = """\
Ask a question about one image or several. The answer is printed while it is
generated.
"""
EXAMPLES = """\
examples:
  jina-vlm ask photo.png "What is in the picture?"
  jina-vlm ask before.png after.png "What has changed?" --max-tiles 4
  curl -s https://example.com/photo.jpg | jina-vlm ask - "Who painted this?"
  jina-vlm ask --json scan.png "What is the total?" | jq -r .answer
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="a path, an http(s) URL, a data URI, or - for stdin"
    )
    parser.add_argument("question", metavar="QUESTION", help="comes last; quote it")
    options.add_model_options(parser)
    options.add_json(parser, "one JSON object (answer, tokens, tiles of each image, seconds of each part)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    options.check_model(args.model)
    options.check_images(args.images)
    started, progress = time.perf_counter(), Progress()
    with progress.step("import", "Importing torch and transformers"):
        from jina_vlm_tools.inference.conversation import Conversation, describe_images
        from jina_vlm_tools.inference.loading import (
            load_image,
            load_on_device,
            load_processor_and_class,
            quiet_libraries,
        )

        quiet_libraries()

    with progress.step("processor", f"Loading the processor of {args.model}"):
        processor, load_model = load_processor_and_class(args.model)
    with progress.step("image", "Opening the image"):
        images = [load_image(source, processor.image_processor) for source in args.images]
        described = describe_images(processor, images, args.max_tiles)
    with progress.step("model", "Loading the model"):
        model = load_on_device(load_model, args.device, args.dtype)
    conversation = Conversation(model, processor, args.max_new_tokens, args.max_tiles)
    with progress.step("tokens", "Making tiles and tokens"):
        inputs = conversation.prepare(args.question, images)

    answer = conversation.generate(inputs, (lambda text: None) if args.json else show)
    total = round(time.perf_counter() - started, 3)
    if args.json:
        report = {
            "answer": answer.text,
            "is_cut_off": answer.is_cut_off,
            "question": args.question,
            "model": args.model,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "images": described,
            "tokens": {"prompt": answer.prompt_tokens, "answer": answer.tokens},
            "seconds": {
                **progress.seconds,
                "first_token": answer.seconds_to_first_token,
                "answer": answer.seconds,
                "total": total,
            },
        }
        print(json.dumps(report, ensure_ascii=False))
        return
    print(flush=True)
    progress.say(
        f"{answer.prompt_tokens} tokens in, {answer.tokens} out; first after {answer.seconds_to_first_token:.2f} s, "
        f"all after {answer.seconds:.2f} s; {total:.1f} s in all."
    )
    if answer.is_cut_off:
        progress.say("The answer is cut off: raise --max-new-tokens.")


def show(text: str) -> None:
    print(text, end="", flush=True)
