"""`python -m jina_vlm_cli`, where the command is not installed."""

from jina_vlm_tools.cli.main import main


main()
