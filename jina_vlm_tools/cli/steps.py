"""The step that `ask`, `chat` and `demo` begin with."""

from .progress import Progress


def load_processor(checkpoint: str, progress: Progress) -> tuple:
    """Import the libraries, and load a processor; with it comes what loads the model (see `inference.loading`)."""
    with progress.step("import", "Importing torch and transformers"):
        from jina_vlm_tools.inference import conversation  # noqa: F401  brings them
        from jina_vlm_tools.inference.loading import load_processor_and_class, quiet_libraries

        quiet_libraries()
    with progress.step("processor", f"Loading the processor of {checkpoint}"):
        return load_processor_and_class(checkpoint)
