"""`python -m jina_vlm_tools VERB`: the command `jina-vlm`, where it is not installed, or for torchrun's `-m`."""

from jina_vlm_tools.cli.main import main


main()
