"""`serve`: OpenAI's API, by the library's server."""

from contextlib import nullcontext

from . import options


DESCRIPTION = "Serve a checkpoint over HTTP by `transformers serve`, whose options these are."


def run(arguments: list[str]) -> None:
    # The server asks for its extra when it starts, by an error of its own; its help needs none.
    with nullcontext() if "--help" in arguments else options.needing("serve"):
        from jina_vlm_tools.inference.serve import serve
    serve(arguments)
