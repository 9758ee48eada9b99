"""A Space of the Hub runs this file."""

import sys
from pathlib import Path

from jina_vlm_tools.cli.main import main


RETRIEVAL = Path(__file__).parent / "retrieval"  # where one was assembled into the Space

main(["app", *(["--retrieval", str(RETRIEVAL)] if RETRIEVAL.is_dir() else []), *sys.argv[1:]])
