"""Kinds of weights, by name, that `convert` makes for engines. Imports nothing that takes time."""

from dataclasses import dataclass

from . import ONNX, OPENVINO, TORCH


# llama.cpp's types
WHOLE = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # and torch's names for them
# Those that need no statistics of what a model computes ("importance matrix"), from the largest to the smallest
QUANTIZED = tuple(
    "Q8_0 Q6_K Q5_K_M Q5_1 Q5_K_S Q5_0 Q4_1 Q4_K_M IQ4_NL Q4_K_S Q4_0 IQ4_XS Q3_K_L Q3_K_M Q3_K_S Q2_K".split()
)
QUANTIZATIONS = (*WHOLE, *QUANTIZED)

# Those of ONNX Runtime and OpenVINO
ACTIVATIONS = "int8-a8"  # what the tower computes with, too, which is calibrated on pages
GRAPH_QUANTIZATIONS = ("int8", "int4", ACTIVATIONS)
BROWSER_QUANTIZATIONS = ("int8", "int4")


@dataclass(frozen=True)
class Vision:
    """What runs tower and connector of a folder for llama.cpp, and how these are quantized: None for not at all."""

    engine: str = TORCH
    quantization: str | None = None


VISIONS = {
    TORCH: Vision(),
    **{engine: Vision(engine) for engine in (ONNX, OPENVINO)},
    **{f"{engine}-{kind}": Vision(engine, kind) for engine in (ONNX, OPENVINO) for kind in ("int8", ACTIVATIONS)},
}
