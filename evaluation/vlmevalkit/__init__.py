"""jina-vlm in VLMEvalKit, which the paper was measured with: `python -m evaluation.vlmevalkit --help`."""
