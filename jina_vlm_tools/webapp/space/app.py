"""A Space of the Hub runs this file."""

import sys

from jina_vlm_tools.cli.main import main


main(["app", *sys.argv[1:]])
