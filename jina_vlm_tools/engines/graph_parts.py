"""Parts of the model that ONNX Runtime or OpenVINO computes, in the place of torch's."""

from pathlib import Path
from typing import Any

import torch
from jina_vlm import JinaVLMConfig, JinaVLMVisionModel
from torch import nn
from transformers.utils.hub import cached_file

from .graph_runners import RUNNERS


class OnCPU:
    """A model without parameters of its own, whose tensors are float32."""

    device = torch.device("cpu")
    dtype = torch.float32


class Graph(nn.Module):
    """A graph with one output. `run` is set by [`load_graphs`]."""

    def __init__(self, *inputs: str):
        super().__init__()
        self.inputs, self.run = inputs, None

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.run(dict(zip(self.inputs, tensors, strict=True)))[0]


class GraphTower(OnCPU, JinaVLMVisionModel):
    """Tiles that are the same are found by the bundle's code, and run once."""

    def __init__(self, config: JinaVLMConfig):
        super(JinaVLMVisionModel, self).__init__(config)
        self.tower = Graph("pixel_values")

    def get_input_embeddings(self) -> None:
        """None: it is a part of the graph."""

    def _encode(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.tower(pixel_values.float())


def make_connector() -> Graph:
    return Graph("features", "is_last_tile")


def load_graphs(
    graphs: dict[str, Graph], engine: str, dtype: Any, checkpoint: str | Path, found: dict[str, Any]
) -> None:
    """
    Load graphs of a checkpoint.

    Args:
        graphs: By the part of the model.
        engine: ONNX or OPENVINO.
        dtype: Of the computation; `"auto"` and None for float32.
        found: Arguments of `from_pretrained` that say where the checkpoint is.

    Raises:
        ImportError: the engine is not installed.
        OSError: a file is missing or damaged.
        ValueError: the engine does not compute in `dtype`.
    """
    dtype, runner = str(dtype).removeprefix("torch."), RUNNERS[engine]
    if dtype not in ("auto", "None", *runner.dtypes):
        raise ValueError(f"{engine} computes in {' or '.join(runner.dtypes)} here, not in {dtype}.")
    for part, graph in graphs.items():
        paths = [cached_file(checkpoint, f"{part}{suffix}", **found) for suffix in runner.files]
        graph.run = runner(paths[0], dtype)
