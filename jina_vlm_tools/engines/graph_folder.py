"""Make of a checkpoint a folder for ONNX Runtime or OpenVINO: a graph for each part, settings and tokenizer."""

import os
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from torch import nn

from . import ONNX, OPENVINO
from .calibration import collect_tiles
from .folder import check_room, complete, load_checkpoint, write_settings, writing
from .graph_model import OnnxForConditionalGeneration, OpenVinoForConditionalGeneration
from .graph_weights import BLOCKS, write_graph
from .graphs import PARTS, draw
from .quantization import ACTIVATIONS


MODELS = {ONNX: OnnxForConditionalGeneration, OPENVINO: OpenVinoForConditionalGeneration}
_FIXED_ROPES = ("default", "linear", "llama3", "yarn")  # the others' frequencies change with a text's length


def convert_for_graphs(
    weights: str, folder: Path, engine: str, quantization: str | None = None, pages: Path | None = None
) -> dict[str, str]:
    """
    Write a checkpoint into `folder`, for ONNX Runtime or OpenVINO. Weights stay in their files until they are written,
    one by one.

    Args:
        weights: A folder or an id of the Hub, in the released layout or this one.
        folder: An empty one.
        engine: One of `MODELS`.
        quantization: One of `GRAPH_QUANTIZATIONS`; None for float32.
        pages: A folder of images and PDFs by which activations are quantized; None for drawn ones.

    Returns:
        What the weights of each part are.

    Raises:
        PublishingError: the disk is too small or full.
        OSError, ValueError: the checkpoint cannot be read, or does what a graph cannot; the message names it.
    """
    model, processor = load_checkpoint(weights)
    return write_for_graphs(model, processor, folder, engine, quantization, pages)


def write_for_graphs(
    model: JinaVLMForConditionalGeneration,
    processor: JinaVLMProcessor,
    folder: Path,
    engine: str,
    quantization: str | None = None,
    pages: Path | None = None,
) -> dict[str, str]:
    """As [`convert_for_graphs`], of a model and a processor. The model's rows for structural tokens are covered."""
    check_architecture(model.config, engine, quantization)
    complete(model, processor)
    check_room(folder, count_bytes(model, list(PARTS), engine, quantization))
    tiles = find_tiles(processor, quantization, pages)
    with writing(folder):
        kinds = write_parts(model, folder, list(PARTS), engine, quantization, tiles)
        write_settings(model, processor, folder, MODELS[engine], "float32")
    return kinds


def find_tiles(processor: JinaVLMProcessor, quantization: str | None, pages: Path | None) -> list | None:
    """What a tower's activations are quantized by, if they are; errors are those of [`collect_tiles`]."""
    return collect_tiles(processor, pages) if quantization == ACTIVATIONS else None


def write_parts(
    model: JinaVLMForConditionalGeneration,
    folder: Path,
    parts: list[str],
    engine: str,
    quantization: str | None,
    tiles: list | None,
) -> dict[str, str]:
    """Write graphs of some of `PARTS`, and tell what the weights of each are. `tiles` are those of [`find_tiles`]."""
    write = _write_onnx if engine == ONNX else _write_openvino
    for part in parts:
        write(model, part, folder, quantization, tiles)
    return {part: describe(part, quantization) for part in parts}


def describe(part: str, quantization: str | None) -> str:
    """What the weights of a part are."""
    if quantization is None:
        return "whole" if part == "embedding" else "float32"
    if part == "decoder" and quantization == "int4":
        return "int4, its head int8"
    return ACTIVATIONS if part == "tower" and quantization == ACTIVATIONS else "int8"


def check_architecture(config, engine: str, quantization: str | None) -> None:
    """
    Raises:
        ValueError: the text model has what a graph cannot compute, or rows that NNCF cannot quantize.
    """
    text = config.text_config
    rope = text.rope_parameters or {}
    widths, group = (text.hidden_size, text.intermediate_size, text.num_attention_heads * text.head_dim), BLOCKS[4]
    if engine == OPENVINO and quantization == "int4" and any(width % group for width in widths):
        raise ValueError(
            f"The text model has rows of {', '.join(map(str, widths))}, which NNCF cannot cut into groups of {group} "
            "for 4 bits. Convert with --quantize int8, or --to onnx."
        )
    for what, is_wrong in (
        (f"`rope_parameters` {rope}", rope.get("rope_type", "default") not in _FIXED_ROPES),
        ("`use_sliding_window`", text.use_sliding_window),
    ):
        if is_wrong:
            raise ValueError(f"The text model has {what}, which a graph cannot compute for every length.")


def count_bytes(
    model: JinaVLMForConditionalGeneration, parts: list[str], engine: str, quantization: str | None
) -> float:
    """Of graphs, and of the largest that lies beside them in float32 before NNCF has quantized it."""
    modules = {
        "tower": model.model.vision_model,
        "connector": model.model.connector,
        "embedding": model.get_input_embeddings(),
        "decoder": nn.ModuleList([model.model.language_model.layers, model.lm_head]),
    }
    numbers = [sum(parameter.numel() for parameter in modules[part].parameters()) for part in parts]
    each = {None: 4, "int4": 1}.get(quantization, 1.2)  # with scales; head, tower and embedding have 8 bits
    is_copied = engine == OPENVINO or quantization == ACTIVATIONS
    return sum(numbers) * each + (max(numbers) * 4 if is_copied else 0)


def bits_of(part: str, quantization: str | None) -> Callable[[str], int | None]:
    """Of each matrix. The head keeps 8: what it rounds away is lost in every answer."""
    if quantization is None:
        return lambda name: None
    return lambda name: 4 if part == "decoder" and quantization == "int4" and name != "lm_head" else 8


def _write_onnx(model, part: str, folder: Path, quantization: str | None, tiles: list | None) -> None:
    path = folder / f"{part}.onnx"
    if part != "tower" or tiles is None:
        drawing = draw(model, part, fuses_attention=part == "tower")
        write_graph(drawing, path, bits_of(part, quantization))
        return
    with TemporaryDirectory(dir=folder, prefix=".whole-") as whole:
        write_graph(draw(model, part), Path(whole, path.name), bits_of(part, None))
        quantized = _quantize_activations(onnx.load(Path(whole, path.name)), tiles)
    onnx.save(quantized, path, save_as_external_data=True, location=f"{path.name}.data")


def _write_openvino(model, part: str, folder: Path, quantization: str | None, tiles: list | None) -> None:
    import openvino

    # Of rows, ONNX's operators for 8 bits are OpenVINO's too.
    bits = bits_of(part, quantization if part == "embedding" else None)
    with TemporaryDirectory(dir=folder, prefix=".whole-") as whole:
        path = Path(whole, f"{part}.onnx")
        write_graph(draw(model, part), path, bits)
        graph = openvino.Core().read_model(path)
        if quantization is not None and part != "embedding":
            is_tower = part == "tower" and tiles is not None
            graph = _quantize_activations(graph, tiles) if is_tower else _compress(graph, part, quantization)
        try:
            openvino.save_model(graph, folder / f"{part}.xml", compress_to_fp16=False)
        except RuntimeError as error:  # what it says of a full disk
            raise OSError(f"OpenVINO cannot write {part}.bin: {error}") from error


def _compress(graph, part: str, quantization: str):
    """Weights in 8 or 4 bits; the quantizer leaves 8 to the last matrix, the head, by itself."""
    nncf = _import_nncf()
    if part == "decoder" and quantization == "int4":
        settings = {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": BLOCKS[4], "ratio": 1.0}
    else:
        settings = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
    with redirect_stdout(StringIO()):
        return nncf.compress_weights(graph, **settings)


def _quantize_activations(graph, tiles: list[torch.Tensor]):
    """Weights and activations in 8 bits, of a graph of ONNX or OpenVINO."""
    nncf = _import_nncf()
    data = nncf.Dataset([{"pixel_values": tile.numpy()} for tile in tiles])
    settings = nncf.AdvancedQuantizationParameters()
    if isinstance(graph, onnx.ModelProto):  # it finds no weights there to shift activations' scale to
        settings.smooth_quant_alphas = nncf.AdvancedSmoothQuantParameters(matmul=-1)
    with redirect_stdout(StringIO()):
        return nncf.quantize(
            graph,
            data,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(tiles),
            advanced_parameters=settings,
        )


def _import_nncf():
    os.environ.setdefault("NNCF_CI", "1")  # its way not to send what it is used for
    import nncf

    nncf.set_log_level("ERROR")
    return nncf
