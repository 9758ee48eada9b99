"""Runs `examples/llamafactory_plugin.py`, and writes what the model is given to the folder $RECORD."""

import functools
import os
import runpy
import sys
from itertools import count
from pathlib import Path

import jina_vlm
import torch


numbers = count()
forward = jina_vlm.JinaVLMForConditionalGeneration.forward


@functools.wraps(forward)
def recorded(self, *args, **kwargs):
    inputs = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    torch.save(inputs, Path(os.environ["RECORD"]) / f"{next(numbers):04}.pt")
    return forward(self, *args, **kwargs)


if __name__ == "__main__":
    jina_vlm.JinaVLMForConditionalGeneration.forward = recorded
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
