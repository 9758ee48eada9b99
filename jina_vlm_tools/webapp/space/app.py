"""A Space of the Hub runs this file."""

from jina_vlm_tools.cli.main import main


main(["app"])
