"""`convert`, `merge` and `upload`: make of a checkpoint or an adapter, and our code, a folder that loads by itself,
here or on the Hub."""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from jina_vlm_tools import sources
from jina_vlm_tools.engines import (
    FOLDERS,
    LLAMA_CPP,
    ONNX,
    OPENVINO,
    TARGETS,
    TORCH,
    TRANSFORMERS_JS,
    check_engine,
    find_engine,
    list_others,
)
from jina_vlm_tools.engines.quantization import (
    ACTIVATIONS,
    BROWSER_QUANTIZATIONS,
    GRAPH_QUANTIZATIONS,
    QUANTIZATIONS,
    VISIONS,
)
from jina_vlm_tools.extras import needing
from jina_vlm_tools.files import new_folder

from . import options
from .pages import AdapterPage, CheckpointPage, tell_answer, tell_vectors
from .progress import Progress


CONVERT = """\
Write a checkpoint in this project's layout, with its code: a new folder that
`from_pretrained(FOLDER, trust_remote_code=True)` loads without this package.

The folder is asked about an image in a fresh process before it takes its
name: it is there as a whole or not at all.

With --to gguf, for llama.cpp instead: the text model as a GGUF file, which
answers text in llama.cpp by itself; tower, connector and settings beside it,
with which `jina-vlm ask`, `chat`, `serve` and `batch` see images.

With --to onnx or --to openvino the whole model as graphs, for ONNX Runtime or
OpenVINO, which these commands run too.

With --to transformers.js graphs for a browser, and a page that answers by
them: `python -m http.server --directory FOLDER` serves it.
"""
CONVERT_EXAMPLES = """\
examples:
  jina-vlm convert jinaai/jina-vlm jina-vlm-native
  jina-vlm convert jinaai/jina-vlm-mlx jina-vlm-from-4-bits
  jina-vlm convert my-checkpoint converted --dtype bfloat16 --max-shard-size 1GB
  jina-vlm ask --model converted photo.png "What is this?"
  jina-vlm convert jinaai/jina-vlm for-llama --to gguf --quantize Q4_K_M
  jina-vlm ask --model for-llama photo.png "What is this?" --engine llama.cpp
  jina-vlm convert jinaai/jina-vlm for-onnx --to onnx --quantize int8
  jina-vlm convert jinaai/jina-vlm for-openvino --to openvino --quantize int8-a8 --calibrate my-pages
  jina-vlm convert checkpoints/tiny page --to transformers.js --quantize int8
"""
MERGE = """\
Merge an adapter for retrieval with its base: a new folder for engines that
take no adapters, or none of the vision tower, as vLLM.

It makes dense vectors, or multi-vectors, and answers no questions. A text and
an image are embedded by it in a fresh process, and by what it was made of.
"""
MERGE_EXAMPLES = """\
examples:
  jina-vlm merge me/jina-vlm-retrieval merged --multi
  jina-vlm merge my-retrieval dense --dense --dtype bfloat16
  vllm serve dense --trust-remote-code --runner pooling
"""
UPLOAD = """\
Publish a checkpoint, or an adapter for retrieval, with this project's code as
a page on the Hub that loads by itself.

The folder is assembled, loaded in a fresh process, asked about an image or
made to embed one, and only then sent, in one commit. An upload that was interrupted is continued by
the same command. The token comes from `hf auth login` or the environment
variable HF_TOKEN.
"""
UPLOAD_EXAMPLES = """\
examples:
  jina-vlm upload --weights jinaai/jina-vlm --dry-run
  jina-vlm upload --weights jinaai/jina-vlm --repo-id me/jina-vlm-transformers
  jina-vlm upload --weights my-checkpoint --license apache-2.0 --origin jinaai/jina-vlm --output page
  jina-vlm upload --adapter my-retrieval --repo-id me/jina-vlm-retrieval --base me/jina-vlm-transformers
"""
UNQUANTIZED = "BF16"
FORMATS = {folder.format: engine for engine, folder in TARGETS.items()}
KINDS = {LLAMA_CPP: QUANTIZATIONS, TRANSFORMERS_JS: BROWSER_QUANTIZATIONS}  # of weights; the others' are alike
WEIGHTS_HELP = f"{options.MODEL_HELP}; or a copy that MLX quantized, which is dequantized"
INTERRUPTED = "Nothing is half-written; run the same command again to go on."
JSON = "one JSON object (files with their sizes, what was changed, what the check said)"


def add_weights_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=options.DTYPES, help="of the weights (default: the checkpoint's own)")
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help=f"largest file of weights (default: {options.SHARD_SIZE})"
    )


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", metavar="WEIGHTS", help=WEIGHTS_HELP)
    parser.add_argument("output", metavar="DIR", type=Path, help="a folder that is new or empty")
    parser.add_argument("--yes", action="store_true", help="replace the converted checkpoint that is in DIR")
    parser.add_argument(
        "--to", choices=("transformers", *FORMATS), default="transformers", help="what for (default: %(default)s)"
    )
    parser.add_argument(
        "--quantize",
        metavar="TYPE",
        help=f"with --to gguf, llama.cpp's type of the text model's weights: {', '.join(QUANTIZATIONS)} (default: "
        f"{UNQUANTIZED}, which quantizes nothing); with --to onnx, openvino or transformers.js: int8, weights in 8 "
        f"bits; int4, those of the text model in 4; but for the last, {ACTIVATIONS}, 8 bits, and what the tower "
        "computes with as well (default: float32)",
    )
    parser.add_argument(
        "--vision",
        choices=VISIONS,
        metavar="KIND",
        help=f"with --to gguf: what runs tower and connector, in which weights: {', '.join(VISIONS)} (default: torch)",
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="DIR",
        help=f"with {ACTIVATIONS}: images and PDFs like those that it will see (default: drawn pages)",
    )
    add_weights_options(parser)
    options.add_json(parser, JSON)
    parser.set_defaults(run=convert, check=check_convert)


def check_convert(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What options cannot say of each other; ends the process with a usage error."""
    engine = FORMATS.get(args.to)
    if engine and args.max_shard_size:
        parser.error(f"--max-shard-size divides this project's layout: leave it out, or --to {args.to}")
    if args.quantize and not engine:
        parser.error(f"--quantize is for engines beside torch: say --to {' or '.join(FORMATS)} too, or leave it out")
    if engine in (ONNX, OPENVINO, TRANSFORMERS_JS) and args.dtype:
        parser.error(f"--dtype is of weights in torch: with --to {args.to} say --quantize, or leave it out")
    if args.quantize:
        kinds = {name.lower(): name for name in KINDS.get(engine, GRAPH_QUANTIZATIONS)}
        if args.quantize.lower() not in kinds:
            parser.error(f"--quantize {args.quantize}: with --to {args.to} choose from {', '.join(kinds.values())}")
        args.quantize = kinds[args.quantize.lower()]
    if args.vision and engine != LLAMA_CPP:
        parser.error("--vision is for llama.cpp, which runs the text model alone: say --to gguf too, or leave it out")
    vision = VISIONS[args.vision or TORCH]
    if args.dtype and vision.engine != TORCH:
        parser.error(f"--dtype is of weights in torch: leave it out, or --vision {args.vision}")
    if args.calibrate and ACTIVATIONS not in (args.quantize, vision.quantization):
        parser.error(f"--calibrate is for --quantize {ACTIVATIONS} or --vision ...-{ACTIVATIONS}: say that too")
    if args.calibrate and not args.calibrate.is_dir():
        parser.error(f"--calibrate {args.calibrate}: no such folder")


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="a retrieval folder, or a repository of the Hub that holds one"
    )
    parser.add_argument("output", metavar="DIR", type=Path, help="a folder that is new or empty")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--dense", dest="kind", action="store_const", const="dense", help="one vector for an input, without projector"
    )
    kind.add_argument(
        "--multi", dest="kind", action="store_const", const="multi", help="one vector for each token, by the projector"
    )
    parser.add_argument("--dtype", choices=options.DTYPES, help="of the merged weights (default: the base's own)")
    parser.add_argument("--yes", action="store_true", help="replace the merged folder that is in DIR")
    options.add_json(parser, JSON)
    parser.set_defaults(run=merge)


def add_upload_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", help=WEIGHTS_HELP)
    what.add_argument(
        "--adapter", type=Path, metavar="DIR", help="a retrieval folder: an adapter, a projector and their settings"
    )
    parser.add_argument(
        "--base",
        metavar="OWNER/NAME",
        help="of an adapter: its base on the Hub, in this layout (default: as the adapter names it)",
    )
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="where it goes")
    parser.add_argument("--output", type=Path, metavar="DIR", help="assemble it here, check it, and send nothing")
    parser.add_argument(
        "--dry-run", action="store_true", help="assemble and check it, print its files and card, keep and send nothing"
    )
    parser.add_argument("--private", action="store_true", help="if the repository is made, make it private")
    parser.add_argument("--revision", help="a branch of the repository, made from main if need be (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="propose it as a pull request to main")
    parser.add_argument("--message", help='of the commit (default: "Upload weights, code and card")')
    parser.add_argument("--license", help="of weights or base, by the Hub's identifier, where no card says it")
    parser.add_argument(
        "--origin",
        help="where the weights come from, where no card of theirs says it: an id of the Hub, or a sentence",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help='results for the card: JSON, {"command": "what printed them", '
        '"results": [arguments of an EvalResult of huggingface_hub, ...]}; or a table, NAME.csv',
    )
    parser.add_argument("--yes", action="store_true", help="replace what is in --output, or in the repository")
    add_weights_options(parser)
    options.add_json(parser, JSON)
    parser.set_defaults(run=upload, check=check_upload, interrupted=INTERRUPTED)


def check_upload(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What options cannot say of each other; ends the process with a usage error."""
    if not (args.repo_id or args.output or args.dry_run):
        parser.error("say where it goes: --repo-id OWNER/NAME, --output DIR, or --dry-run for neither")
    if args.create_pr and args.revision:
        parser.error("--create-pr proposes to main: leave --revision out")
    if args.output and args.dry_run:
        parser.error("--dry-run keeps nothing: leave --output out")
    for option in ("origin", "dtype", "max_shard_size") if args.adapter else ("base",):
        if getattr(args, option) is not None:
            parser.error(
                f"--{option.replace('_', '-')} is for --{'weights' if args.adapter else 'adapter'}: leave it out"
            )


def convert(args: argparse.Namespace) -> None:
    from jina_vlm_tools.hub.check import ask, check_shards, list_bundle

    progress = quiet_or_not()
    sources.check_model(args.weights, "WEIGHTS", "")
    check_engine(args.weights, TORCH)
    check_output(args.output, args.yes, args.weights)
    check_shards(args.weights)
    if engine := FORMATS.get(args.to):
        convert_for_engine(args, engine, progress)
        return

    from jina_vlm_tools.hub.assemble import assemble

    with new_folder(args.output, replace=args.yes) as folder:
        with progress.step("assemble", f"Assembling {args.weights}"):
            assembled = assemble(args.weights, folder, args.dtype or "auto", args.max_shard_size or options.SHARD_SIZE)
        names = list_bundle(folder, with_card=False)
        with progress.step("check", "Asking it in a fresh process"):
            answer = ask(folder)
        sizes = measure(folder, names)
        report = {"folder": str(args.output), "files": sizes, "changes": assembled.changes, "answer": answer}
    tell(args, report, ["\n".join(assembled.changes), tell_answer(answer)])


def convert_for_engine(args: argparse.Namespace, engine: str, progress: Progress) -> None:
    with needing(TARGETS[engine].extra, f"`jina-vlm convert --to {args.to}`"):
        if engine == TRANSFORMERS_JS:
            from jina_vlm_tools.engines.browser_folder import ask_graphs as ask
        else:
            from jina_vlm_tools.engines.folder import ask

        write = {LLAMA_CPP: _for_llama_cpp, TRANSFORMERS_JS: _for_browser}.get(engine, _for_graphs)(args)

    with new_folder(args.output, replace=args.yes) as folder:
        with progress.step("assemble", f"Converting {args.weights}"):
            tensors = write(folder)
        where = "by ONNX Runtime" if engine == TRANSFORMERS_JS else "in a fresh process"
        with progress.step("check", f"Asking it {where}"):
            answer = ask(folder)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        sizes = measure(folder, names)
        report = {"folder": str(args.output), "files": sizes, "tensors": tensors, "answer": answer}
    kinds = ", ".join(f"{what}: {kind}" for what, kind in tensors.items())
    tell(
        args,
        report,
        [
            f"Weights by {'type' if engine == LLAMA_CPP else 'part'}: {kinds}.",
            tell_answer(answer),
        ],
    )


def _for_llama_cpp(args: argparse.Namespace) -> Callable[[Path], dict]:
    """What writes the folder and returns how many of the text model's tensors have which type."""
    from jina_vlm_tools.engines.gguf_folder import convert_for_llama_cpp

    vision = VISIONS[args.vision or TORCH]
    if vision.engine != TORCH:
        with needing(FOLDERS[vision.engine].extra, f"--vision {args.vision}"):
            from jina_vlm_tools.engines import graph_folder  # noqa: F401
    return lambda folder: convert_for_llama_cpp(
        args.weights, folder, args.quantize or UNQUANTIZED, args.dtype or "auto", vision, args.calibrate
    )


def _for_graphs(args: argparse.Namespace) -> Callable[[Path], dict]:
    """What writes the folder and returns which type the weights of each part have."""
    from jina_vlm_tools.engines.graph_folder import convert_for_graphs

    return lambda folder: convert_for_graphs(args.weights, folder, FORMATS[args.to], args.quantize, args.calibrate)


def _for_browser(args: argparse.Namespace) -> Callable[[Path], dict]:
    """What writes the folder and returns which type the weights of each graph have."""
    from jina_vlm_tools.engines.browser_folder import convert_for_browser

    return lambda folder: convert_for_browser(args.weights, folder, args.quantize)


def merge(args: argparse.Namespace) -> None:
    progress = quiet_or_not()
    sources.check_model(args.adapter, "ADAPTER", "")
    check_output(args.output, args.yes, args.adapter, "merged folder")
    with needing("retrieval", "`jina-vlm merge`"):
        from jina_vlm_tools.hub.embedding import compare
        from jina_vlm_tools.hub.merged import find_source, list_merged
        from jina_vlm_tools.hub.merged import merge as write_merged

        source, base = find_source(args.adapter)
    with new_folder(args.output, replace=args.yes) as folder:
        with progress.step("merge", f"Merging {args.adapter} with {base.name}"):
            write_merged(source, folder, args.kind, args.dtype or "auto")
        names = list_merged(folder)
        with progress.step("check", "Embedding by it in a fresh process"):
            said = compare(folder, source, base)
        report = {"folder": str(args.output), "base": base.name, "files": measure(folder, names), **said}
    tell(args, report, tell_vectors(report))


def upload(args: argparse.Namespace) -> None:
    from huggingface_hub import HfApi

    from jina_vlm_tools.hub.push import check_name, find_target, push

    # Cheap questions first: the rest takes minutes for large weights.
    progress = quiet_or_not()
    if args.repo_id:
        check_name(args.repo_id)
    if args.weights:
        check_engine(args.weights, TORCH)
    if args.adapter:
        from jina_vlm_tools.hub.retrieval import check_kind

        check_kind(args.adapter)
    results = None
    if args.results:
        from jina_vlm_tools.hub.card import read_results

        results = read_results(args.results)
    target, api = None, HfApi()
    if not (args.output or args.dry_run):
        where = {"revision": args.revision, "create_pr": args.create_pr, "private": args.private, "replace": args.yes}
        target = find_target(api, args.repo_id, **where)
    if args.output:
        source = str(args.adapter or args.weights)
        check_output(args.output, args.yes, source, "page" if args.adapter else "checkpoint")
    page = AdapterPage(args, is_sent=target is not None) if args.adapter else CheckpointPage(args)

    with ExitStack() as stack:
        if args.output:
            folder = stack.enter_context(new_folder(args.output, replace=args.yes))
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jina-vlm-")))
        with progress.step("assemble", f"Assembling {page.source}"):
            page.assemble(folder)
        name = args.repo_id or (args.output.resolve().name if args.output else page.default_name)
        card = page.write_card(folder, name, results)
        names = page.list_files(folder)
        with progress.step("check", page.checking):
            said = page.check(folder)
        report = {"files": measure(folder, names), **said, "license": page.origin.license}
        if not args.json:
            print("\n".join([*page.tell(report), show_files(report), page.tell_origin()]), flush=True)
        if args.dry_run:
            report["card"] = card.content
        if target:
            with progress.step("send", f"Sending it to {args.repo_id}"):
                report["url"] = push(api, folder, names, target, args.message or page.message, args.private)
    if args.output:
        report["folder"] = str(args.output)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    elif args.dry_run:
        print(f"\n{card.content}")
    elif target:
        print(f"Done, and equal to what was sent: {report['url']}")
    else:
        print(f"It is in {args.output}.")


def quiet_or_not() -> Progress:
    """The command's own progress, with the libraries' bars hidden. Call it before transformers is imported."""
    from huggingface_hub.utils import disable_progress_bars

    progress = Progress()
    if not progress.is_shown:
        disable_progress_bars()
    return progress


def tell(args: argparse.Namespace, report: dict, lines: list[str]) -> None:
    """Print what was made in a folder, for people or as JSON."""
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print("\n".join([show_files(report), *lines, f"It is in {args.output}."]))


def measure(folder: Path, names: list[str]) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in names}


def show_files(report: dict) -> str:
    lines = [f"{size:>15,}  {name}" for name, size in report["files"].items()]
    return "\n".join([*lines, f"{sum(report['files'].values()):>15,}  bytes in {len(lines)} files"])


def check_output(output: Path, replace: bool, source: str, kind: str = "checkpoint") -> None:
    """Refuse to write over what is there, or, with --yes, over anything but what the same command wrote: a
    "checkpoint", a "page" of an adapter or a "merged folder"; and never over `source`, which it is made of."""
    from jina_vlm_tools.hub import PublishingError
    from jina_vlm_tools.hub.check import CARD, list_bundle

    if output.exists() and not output.is_dir():
        raise PublishingError(f"{output} is a file. Name a folder.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not replace:
        raise PublishingError(f"{output} is not empty. Name another folder, or say --yes to replace the {kind} in it.")
    made, given = output.resolve(), Path(source).resolve()
    if given.exists() and (made == given or made in given.parents):  # else it is an id of the Hub
        raise PublishingError(f"{output} holds {source}, which --yes would replace too. Name another folder.")
    if kind == "checkpoint" and find_engine(output) != TORCH:
        if others := list_others(output):
            raise PublishingError(f"{output} also holds {', '.join(others)}. Move it away, or name another folder.")
        return
    try:
        if kind == "checkpoint":
            list_bundle(output, with_card=(output / CARD).exists())
        elif kind == "page":
            from jina_vlm_tools.hub.retrieval import list_files

            list_files(output, with_card=(output / CARD).exists())
        else:
            from jina_vlm_tools.hub.merged import list_merged

            list_merged(output)
    except PublishingError as error:
        raise PublishingError(f"{output} is not empty, and no {kind} that --yes could replace: {error}") from error


def explain_hub_error(error: Exception, is_upload: bool) -> str | None:
    """What an error of the Hub's client means and what to do, if it is one. Other commands than `upload` only read."""
    # Also asked about errors that came before the client was loaded, and that are none of its.
    if "huggingface_hub" not in sys.modules:
        return None
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

    failure = error.__cause__ if type(error) is RuntimeError else error  # uploads of large files are wrapped in one
    if not isinstance(failure, HTTPError):
        return None
    untouched = "Nothing is half-written there. " if is_upload else ""
    again = f"run the same command again{': files that have arrived are not sent twice' if is_upload else ''}."
    if not isinstance(failure, HfHubHTTPError):
        return (
            f"{constants.ENDPOINT} cannot be reached: {failure}\n"
            f"{untouched}Check the network (and HF_ENDPOINT, if you set it), then {again}"
        )
    forbidden = "The token may not read it: make one that may."
    if is_upload:
        forbidden = "The token may not write there: make one that may, or choose a name of your own, or --create-pr."
    if isinstance(failure, RepositoryNotFoundError):  # which the Hub says of private ones too
        advice = "Check the name, and that the token may read it."
    else:
        advice = {
            401: "The token is not valid: run `hf auth login`, or correct HF_TOKEN.",
            403: forbidden,
            412: "It was changed while this was going on: look at it, then run the same command again.",
        }.get(failure.response.status_code, again.capitalize())
    return f"{constants.ENDPOINT} refused: {failure}\n{untouched}{advice}"
