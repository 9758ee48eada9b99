"""Checkpoints and images, from what people name them by."""

import sys
from pathlib import Path

from jina_vlm_tools.cli.options import STDIN


def load_processor_and_class(checkpoint: str):
    """
    A folder that holds the modules runs them; anything else is run by the package's own code, with none of its own.

    Returns:
        The processor, and a function that loads the model, with the arguments of `from_pretrained`.

    Raises:
        SystemExit: there is no such checkpoint, or no code for it; the message says why.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    is_bundle = Path(checkpoint, "modeling_jina_vlm.py").is_file()
    if not is_bundle:
        try:
            import jina_vlm  # noqa: F401  registers the classes
        except ImportError as error:
            sys.exit(
                f"error: {checkpoint} brings no code of this layout, and the package is not installed ({error}): "
                "pip install ."
            )
    try:
        processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=is_bundle)
    except OSError as error:
        sys.exit(f"error: {checkpoint}: {error}")
    return processor, lambda **kwargs: AutoModelForImageTextToText.from_pretrained(
        checkpoint, trust_remote_code=is_bundle, **kwargs
    )


def load_on_device(load_model, device: str | None = None, dtype: str | None = None):
    """
    The model, ready to answer.

    Args:
        load_model: See [`load_processor_and_class`].
        device: Such as `"cuda:1"`; a GPU, if there is one, where it is left out.
        dtype: Float32 on a CPU, and the checkpoint's own elsewhere, where it is left out.

    Raises:
        ValueError: the device is not there.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device {device}: {str(error).splitlines()[0]}. Leave it out for the best one there is."
        ) from error
    return load_model(dtype=dtype or ("float32" if device == "cpu" else "auto")).eval().to(device)


def quiet_libraries() -> None:
    """No bars and warnings of the library's: a command says by itself what it does."""
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def load_image(source: str, image_processor):
    """
    An image as the model sees it: a PIL image, upright, in RGB, transparency on white.

    Raises:
        OSError, ValueError: there is none, or it cannot be read; the message says why.
    """
    from jina_vlm.image_loading_jina_vlm import open_image
    from PIL import Image

    if source == STDIN:
        try:
            image = open_image(sys.stdin.buffer.read())
        except ValueError as error:
            raise ValueError(f"What came on stdin: {error}") from error
    else:
        image = image_processor.fetch_images(source)
    return Image.fromarray(image_processor.process_image(image).permute(1, 2, 0).numpy())
