"""`serve`: OpenAI's API, by the library's server."""

DESCRIPTION = "Serve a checkpoint over HTTP by `transformers serve`, whose options these are."


def run(arguments: list[str]) -> None:
    try:
        from jina_vlm_tools.inference.serve import serve
    except ImportError as error:
        raise OSError(f"`jina-vlm serve` needs `pip install 'jina-vlm-transformers[serve]'` ({error}).") from error
    serve(arguments)
