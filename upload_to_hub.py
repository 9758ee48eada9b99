"""Publish a checkpoint with this repository's code as a page on the Hub that loads by itself:

    python upload_to_hub.py --weights jinaai/jina-vlm --repo-id me/jina-vlm-transformers

The folder is assembled, loaded in a fresh process, asked about a picture, and only then sent, in one commit. An upload that was
interrupted is continued by the same command. The token comes from `hf auth login` or the environment variable HF_TOKEN.
"""

import argparse
import importlib.util
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path


ROOT = Path(__file__).parent


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="a folder or an id of the Hub, in the released layout or this one")
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="where it goes")
    parser.add_argument("--output", type=Path, metavar="DIR", help="assemble it here, check it, and send nothing")
    parser.add_argument("--dry-run", action="store_true", help="assemble and check it, print its files and card, keep and send nothing")
    parser.add_argument("--private", action="store_true", help="if the repository is made, make it private")
    parser.add_argument("--revision", help="a branch of the repository, made from main if need be (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="propose it as a pull request to main")
    parser.add_argument("--message", default="Upload weights, code and card", help="of the commit (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights (default: the checkpoint's own)",
    )
    parser.add_argument("--max-shard-size", default="2GB", help="largest file of weights (default: %(default)s)")
    parser.add_argument("--license", help="of the weights, by the Hub's identifier, where no card of theirs says it")
    parser.add_argument("--origin", help="where the weights come from, where no card of theirs says it: an id of the Hub, or a sentence")
    parser.add_argument("--results", type=Path, metavar="JSON", help="results for the card; see publishing/card.py")
    parser.add_argument("--yes", action="store_true", help="replace what is in --output, or in the repository")
    args = parser.parse_args(args)
    if not (args.repo_id or args.output or args.dry_run):
        parser.error("say where it goes: --repo-id OWNER/NAME, --output DIR, or --dry-run for neither")
    if args.create_pr and args.revision:
        parser.error("--create-pr proposes to main: leave --revision out")
    if args.output and args.dry_run:
        parser.error("--dry-run keeps nothing: leave --output out")
    return args


def publish(args: argparse.Namespace) -> None:
    from huggingface_hub import HfApi

    from publishing.origin import find_origin
    from publishing.push import check_name, find_target, push

    # Cheap questions first: the rest takes minutes for large weights.
    if args.repo_id:
        check_name(args.repo_id)
    target, api = None, HfApi()
    if not (args.output or args.dry_run):
        options = {"revision": args.revision, "create_pr": args.create_pr, "private": args.private, "replace": args.yes}
        target = find_target(api, args.repo_id, **options)
    if args.output:
        check_output(args.output, args.yes)
    origin = find_origin(args.weights, args.license, args.origin)

    if importlib.util.find_spec("jina_vlm") is None:  # not installed: the checkout is the package
        spec = importlib.util.spec_from_file_location("jina_vlm", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        sys.modules["jina_vlm"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["jina_vlm"])
    from publishing.assemble import assemble, new_folder
    from publishing.card import write_card
    from publishing.check import ask, list_bundle

    with ExitStack() as stack:
        if args.output:
            folder = stack.enter_context(new_folder(args.output, replace=args.yes))
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jina-vlm-")))
        print(f"Assembling {args.weights} ...", flush=True)
        assembled = assemble(args.weights, folder, args.dtype, args.max_shard_size)
        name = args.repo_id or (args.output.resolve().name if args.output else "jina-vlm")
        card = write_card(folder, name, origin, assembled.changes, assembled.commit, args.results)
        names = list_bundle(folder)
        print("Asking it in a fresh process ...", flush=True)
        print(f"It answers: {ask(folder)}")
        sizes = {name: (folder / name).stat().st_size for name in names}
        print("".join(f"{size:>15,}  {name}\n" for name, size in sizes.items()) + f"{sum(sizes.values()):>15,}  bytes in {len(names)} files")
        print(f"Weights: {origin.license}. {origin.text}.", flush=True)
        if args.dry_run:
            print(f"\n{card.content}")
        if target:
            print(f"Sending it to {args.repo_id} ...", flush=True)
            print(f"Done, and equal to what was sent: {push(api, folder, names, target, args.message, args.private)}")
    if args.output:
        print(f"It is in {args.output}.")


def check_output(output: Path, replace: bool) -> None:
    """Refuse to write over what is there, or, with --yes, over anything but a bundle."""
    from publishing import PublishingError
    from publishing.check import list_bundle

    if output.exists() and not output.is_dir():
        raise PublishingError(f"--output {output} is a file. Name a folder.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not replace:
        raise PublishingError(f"--output {output} is not empty. Name another folder, or say --yes to replace the bundle in it.")
    try:
        list_bundle(output)
    except PublishingError as error:
        raise PublishingError(f"--output {output} is not empty, and no bundle that --yes could replace: {error}") from error


def main() -> None:
    args = parse_args()
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    from publishing import PublishingError

    try:
        publish(args)
    except PublishingError as error:
        sys.exit(f"error: {error}")
    except (HTTPError, RuntimeError) as error:
        failure = error.__cause__ if type(error) is RuntimeError else error  # uploads of large files are wrapped in one
        if isinstance(failure, HfHubHTTPError):
            sys.exit(f"error: {constants.ENDPOINT} refused: {failure}\nNothing is half-written there. {advice(failure)}")
        if isinstance(failure, HTTPError):
            sys.exit(
                f"error: {constants.ENDPOINT} cannot be reached: {failure}\nNothing is half-written there. Check the network (and "
                "HF_ENDPOINT, if you set it), then run the same command again: files that have arrived are not sent twice."
            )
        raise
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. Nothing is half-written; run the same command again to go on.")


def advice(failure) -> str:
    from huggingface_hub.errors import RepositoryNotFoundError

    if isinstance(failure, RepositoryNotFoundError):  # which the Hub says of private ones too
        return "Check the name, and that the token may read it."
    return {
        401: "The token is not valid: run `hf auth login`, or correct HF_TOKEN.",
        403: "The token may not write there: make one that may, or choose a name of your own, or --create-pr.",
        412: "It was changed while this was going on: look at it, then run the same command again.",
    }.get(failure.response.status_code, "Run the same command again: files that have arrived are not sent twice.")


if __name__ == "__main__":
    main()
