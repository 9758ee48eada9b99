"""The command's parser, its errors and exit codes. Slow imports are left to the commands themselves."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from . import app, ask, batch, chat, demo, index, publish, search, serve, tiles, train


DESCRIPTION = """\
jina-vlm: ask a small multilingual model about images, find pages by questions,
see how it sees them, serve, train, convert, merge and publish its checkpoints.
"""
EXIT_CODES = """\
exit codes:
  0  done
  1  it failed: stderr says why and what to do ("error: ...")
  2  the command is not understood
  130  interrupted (Ctrl-C); 143  terminated
  141  the reader of the output has gone

Answers and results go to stdout; progress goes to stderr, and only to a
terminal.
"""
MORE = "`jina-vlm COMMAND --help` explains each, with examples.\n\n"
STOPPED, READER_GONE, TERMINATED = 130, 141, 143  # 128 and the signal's number, as shells count


class Terminated(KeyboardInterrupt):
    """Somebody wants the command to end, who is not at the keyboard."""


class Version(argparse.Action):
    """As argparse's own, whose text would be looked up for each command."""

    def __call__(self, parser, *_) -> None:
        from importlib.metadata import version

        print(f"{parser.prog} {version('jina-vlm-transformers')}")
        parser.exit()


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the whole, and those of the commands by their names."""
    parser = argparse.ArgumentParser(
        "jina-vlm",
        description=DESCRIPTION,
        epilog=MORE + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="say which version this is")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for name, summary, description, examples, add_arguments in (
        ("ask", "ask a question about images", ask.DESCRIPTION, ask.EXAMPLES, ask.add_arguments),
        ("chat", "talk about images, turn by turn", chat.DESCRIPTION, chat.EXAMPLES, chat.add_arguments),
        (
            "tiles",
            "see what becomes of an image, count its tokens",
            tiles.DESCRIPTION,
            tiles.EXAMPLES,
            tiles.add_arguments,
        ),
        (
            "batch",
            "answer a question about every image of a folder or data set",
            batch.DESCRIPTION,
            batch.EXAMPLES,
            batch.add_arguments,
        ),
        (
            "index",
            "make an index of the pages of a folder, images and PDFs",
            index.DESCRIPTION,
            index.EXAMPLES,
            index.add_arguments,
        ),
        (
            "search",
            "find the pages of an index that fit a question",
            search.DESCRIPTION,
            search.EXAMPLES,
            search.add_arguments,
        ),
        ("app", "open a page to try a checkpoint on", app.DESCRIPTION, app.EXAMPLES, app.add_arguments),
        ("demo", "watch a checkpoint answer, step by step", demo.DESCRIPTION, demo.EXAMPLES, demo.add_arguments),
        ("train", "train or fine-tune by a recipe", train.DESCRIPTION, train.EXAMPLES, train.add_arguments),
        (
            "convert",
            "write a checkpoint in this layout, with its code",
            publish.CONVERT,
            publish.CONVERT_EXAMPLES,
            publish.add_convert_arguments,
        ),
        (
            "merge",
            "merge an adapter for retrieval with its base",
            publish.MERGE,
            publish.MERGE_EXAMPLES,
            publish.add_merge_arguments,
        ),
        (
            "upload",
            "publish a checkpoint or an adapter on the Hub",
            publish.UPLOAD,
            publish.UPLOAD_EXAMPLES,
            publish.add_upload_arguments,
        ),
    ):
        command = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=f"{examples}\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(check=None, interrupted=None)
        add_arguments(command)
    commands.add_parser("serve", help="serve a checkpoint over HTTP, as OpenAI's API", description=serve.DESCRIPTION)
    return parser, commands.choices


def parse_args(arguments: list[str]) -> argparse.Namespace:
    """What the arguments ask for, with `run`, the function that does it; ends the process with help or a usage
    error."""
    parser, commands = make_parser()
    if not arguments or arguments[0] not in commands:
        return parser.parse_args(arguments)  # help, or an error
    if arguments[0] == "serve":
        return argparse.Namespace(run=lambda _: serve.run(arguments[1:]))
    command = commands[arguments[0]]
    args = command.parse_intermixed_args(arguments[1:])  # options may stand between images and question
    if args.check:
        args.check(command, args)
    return args


def main(arguments: list[str] | None = None) -> None:
    """
    Raises:
        SystemExit: with a code of `EXIT_CODES`, unless all went well; a message in its place is for stderr, and means
        1.
    """
    args = None
    open_streams()
    try:
        try:
            args = parse_args(sys.argv[1:] if arguments is None else arguments)
            with heeding_termination():
                args.run(args)
        finally:
            sys.stdout.flush()  # here, where it can be told that nobody reads
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the interpreter flushes once more when it ends
        sys.exit(READER_GONE)
    except KeyboardInterrupt as error:
        print(f"\nInterrupted. {getattr(args, 'interrupted', None) or ''}".rstrip(), file=sys.stderr)
        sys.exit(TERMINATED if isinstance(error, Terminated) else STOPPED)
    except Exception as error:
        if message := explain(error, is_upload=getattr(args, "run", None) is publish.upload):
            sys.exit(f"error: {message}")
        raise


@contextmanager
def heeding_termination() -> Iterator[None]:
    """Let a termination end a command as Ctrl-C does, which takes back what was begun."""

    def end(*_) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # which alone may say so
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def open_streams() -> None:
    """Let what stands in no file be read and written: streams that a shell closed, and names that are not UTF-8."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  as long as the process lasts
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # in JSON, too, such escapes are valid


def explain(error: Exception, is_upload: bool = False) -> str | None:
    """What to tell a user of an error; None if its traceback tells more, as that of a fault of ours does."""
    from jina_vlm_tools.hub import PublishingError

    if message := publish.explain_hub_error(error, is_upload):
        return message
    if isinstance(error, (PublishingError, OSError, ValueError)):
        return str(error)
    # Only libraries that are loaded can have raised something.
    hub_errors = sys.modules.get("huggingface_hub.errors")
    if hub_errors and isinstance(error, hub_errors.StrictDataclassError):
        return f"the checkpoint's config.json is not valid: {error}"
    if "jinja2" in sys.modules and isinstance(error, sys.modules["jinja2"].TemplateError):
        return f"the checkpoint's chat template refuses this conversation, or is not valid: {error}"
    full = (MemoryError, sys.modules["torch"].OutOfMemoryError) if "torch" in sys.modules else MemoryError
    if isinstance(error, full):
        return (
            f"memory is full: {(str(error) or type(error).__name__).splitlines()[0]}\n"
            "Fewer tiles (--max-tiles), fewer images at once, --dtype bfloat16 or --device cpu need less of it."
        )
    return None
