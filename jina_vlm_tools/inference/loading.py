"""Checkpoints and images, from what people name them by."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jina_vlm_tools.engines import LLAMA_CPP, find_engine
from jina_vlm_tools.sources import MODEL_ADVICE, STDIN


LARGE = 1_000_000_000  # parameters


def load_processor_and_class(checkpoint: str):
    """
    A folder that holds the modules runs them; anything else is run by the package's own code, with none of its own.

    Returns:
        The processor, and a function that loads the model, with the arguments of `from_pretrained`.

    Raises:
        SystemExit: there is no such checkpoint, or no code for it; the message says why.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    is_bundle = _brings_code(checkpoint)
    with _reaching(checkpoint):
        processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=is_bundle)

    def load_model(device: str = "cpu", dtype: str | None = None, **kwargs):
        dtype = dtype or default_dtype(checkpoint, device)
        if find_engine(checkpoint) == LLAMA_CPP:
            kwargs["use_gpu"] = device != "cpu"
        model_class = AutoModelForImageTextToText
        return model_class.from_pretrained(checkpoint, trust_remote_code=is_bundle, dtype=dtype, **kwargs)

    return processor, load_model


def load_image_processor(checkpoint: str):
    """
    Raises:
        SystemExit: as by [`load_processor_and_class`].
    """
    from jina_vlm import JinaVLMImageProcessor

    with _reaching(checkpoint):
        return JinaVLMImageProcessor.from_pretrained(checkpoint)


def default_dtype(checkpoint: str, device: str) -> str:
    """
    What a checkpoint is computed in where nobody says: bfloat16 for a large one. The release is stored in float32,
    9.9 GB that half suffices for, and computes in bfloat16 itself where flash attention runs. A small one takes
    float32 on a CPU, and its own elsewhere; so does a quantized one everywhere: the library casts a part of it only.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    is_bundle = _brings_code(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=is_bundle)
    if getattr(config, "quantization_config", None):
        return "auto"
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=is_bundle)
    if model.num_parameters() >= LARGE:
        return "bfloat16"
    return "float32" if torch.device(device).type == "cpu" else "auto"


def _brings_code(checkpoint: str) -> bool:
    """Whether a folder holds the modules, or else needs the package's, which are registered here."""
    is_bundle = Path(checkpoint, "modeling_jina_vlm.py").is_file()
    if not is_bundle:
        try:
            import jina_vlm  # noqa: F401  registers the classes

            # and those of checkpoints for other engines
            import jina_vlm_tools.engines.graph_model  # noqa: F401
            import jina_vlm_tools.engines.llama_cpp  # noqa: F401
        except ImportError as error:
            sys.exit(
                f"error: {checkpoint} brings no code of this layout, and the package is not installed ({error}): "
                "pip install ."
            )
    return is_bundle


@contextmanager
def _reaching(checkpoint: str) -> Iterator[None]:
    """Where a checkpoint's settings are loaded: what goes wrong is told with what to give instead."""
    from huggingface_hub import hf_hub_download

    try:
        if not Path(checkpoint).is_dir():
            hf_hub_download(checkpoint, "config.json")  # a Hub that is not there is waited for once, not for each file
        yield
    except (OSError, ValueError) as error:
        sys.exit(f"error: --model {checkpoint} cannot be loaded: {error}\n{MODEL_ADVICE}")


def load_on_device(load_model, device: str | None = None, dtype: str | None = None):
    """
    The model, ready to answer.

    Args:
        load_model: See [`load_processor_and_class`].
        device: Such as `"cuda:1"`; a GPU, if there is one, where it is left out.
        dtype: [`default_dtype`], where it is left out.

    Raises:
        ValueError: the device is not there.
    """
    device = choose_device(device)
    return load_model(device=device, dtype=dtype).eval().to(device)


def choose_device(device: str | None = None) -> str:
    """A GPU, if there is one, where none is named.

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
    return device


def quiet_libraries() -> None:
    """No bars and warnings of the libraries': a command says by itself what it does. A terminal sees downloads."""
    import huggingface_hub
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()


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
