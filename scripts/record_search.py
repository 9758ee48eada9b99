"""A run of `jina-vlm index`, `search` and `ask --index` on a folder, as text for docs/search.md:
`python -m scripts.record_search FOLDER --model RETRIEVAL_FOLDER`.

The index is made anew, beside the folder's own if there is one, and deleted at the end.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path


QUESTIONS = ("How many circles are there?", "a drawing of a tiger", "a family tree")


def record(folder: Path, model: str, questions: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        index = Path(place) / "index"
        named = {str(index): "papers.index", str(folder): "papers", model: "RETRIEVAL_FOLDER"}
        commands = [["index", str(folder), "--output", str(index), "--model", model]] * 2
        commands += [["search", str(index), question, "--top", "3"] for question in questions]
        commands += [["ask", "--index", str(index), question, "--max-new-tokens", "40"] for question in questions]
        for command in commands:
            done = subprocess.run([sys.executable, "-m", "jina_vlm_tools", *command], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            said = f"$ jina-vlm {shlex.join(command)}\n{done.stdout}"
            for long, short in named.items():
                said = said.replace(long, short)
            print(said, end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="of images and PDFs")
    parser.add_argument("--model", required=True, help="as of `jina-vlm index`")
    parser.add_argument("--question", action="append", help="repeatable (default: some about drawings)")
    args = parser.parse_args()
    record(args.folder, args.model, args.question or list(QUESTIONS))


if __name__ == "__main__":
    main()
