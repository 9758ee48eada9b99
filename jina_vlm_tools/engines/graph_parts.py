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
    """A graph with one output, whose last dimension is `width`. `run` is set by [`load_graphs`]."""

    def __init__(self, width: int, *inputs: str):
        super().__init__()
        self.width, self.inputs, self.run = width, inputs, None

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.run(dict(zip(self.inputs, tensors, strict=True)))[0]


class GraphTower(OnCPU, JinaVLMVisionModel):
    """Tiles that are the same are found by the bundle's code, and run once."""

    def __init__(self, config: JinaVLMConfig):
        super(JinaVLMVisionModel, self).__init__(config)
        width = config.vision_config.hidden_size * len(config.vision_feature_layers)
        self.tower = Graph(width, "pixel_values")

    def get_input_embeddings(self) -> None:
        """None: it is a part of the graph."""

    def _encode(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.tower(pixel_values.float())


def make_connector(config: JinaVLMConfig) -> Graph:
    """Make a connector that is a graph, yet to be loaded."""
    return Graph(config.text_config.hidden_size, "features", "is_last_tile")


def cache_names(kind: str, layers: int) -> list[str]:
    """Of a decoder's inputs ("past_key_values") or outputs ("present"): keys and values of each layer, in order."""
    return [f"{kind}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


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
        ValueError: the engine does not compute in `dtype`, or a file is of another checkpoint.
    """
    dtype, runner = str(dtype).removeprefix("torch."), RUNNERS[engine]
    if dtype not in ("auto", "None", *runner.dtypes):
        raise ValueError(f"{engine} computes in {' or '.join(runner.dtypes)} here, not in {dtype}.")
    for part, graph in graphs.items():
        paths = [_find(checkpoint, f"{part}{suffix}", found) for suffix in runner.files]
        graph.run = runner(paths[0], dtype)
        if (graph.run.width, graph.run.inputs) != (graph.width, set(graph.inputs)):
            raise ValueError(
                f"{paths[0]} makes vectors of {graph.run.width} of {len(graph.run.inputs)} inputs, expected "
                f"{graph.width} of {len(graph.inputs)}: it is of another checkpoint than its config.json."
            )


def _find(checkpoint: str | Path, name: str, found: dict[str, Any]) -> str:
    folder = Path(checkpoint, found.get("subfolder", ""))
    if folder.is_dir() and not (folder / name).is_file():
        raise OSError(f"{folder} has no {name}. Convert the checkpoint again.")
    return cached_file(checkpoint, name, **found)
