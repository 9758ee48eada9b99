"""`python -m jina_vlm_cli`, where the command is not installed."""

from .main import main


main()
