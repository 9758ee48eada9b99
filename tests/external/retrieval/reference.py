"""Folders of fixed random weights, and the vectors that everything is compared with: by transformers and PEFT on the
generating model, pooled and projected by our own few lines.

    python reference.py FOLDER

writes both, for engines in other environments:

all/, decoder/       retrieval folders: with an adapter of tower, connector and decoder, partly in float8, and of the
                     decoder alone
dense/, multi/       the first, merged
vectors.npz          "ADAPTER/CASE/dense" [hidden] and "ADAPTER/CASE/multi" [tokens, 128]; ADAPTER "none" is the base
"""

import sys
from pathlib import Path

import numpy as np
import torch
from cases import ALL, CHECKPOINT, DECODER, DENSE, MAX_TILES, MULTI, VECTORS, cases
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from jina_vlm_tools.retrieval.folder import RetrievalFolder, merge_folder, read_folder, write_folder
from jina_vlm_tools.retrieval.inputs import prepare
from jina_vlm_tools.retrieval.scores import cut, pool
from jina_vlm_tools.training.lora import add_adapters
from jina_vlm_tools.training.stages import LoraSettings


PARTS = {ALL: ["encoder", "connector", "decoder"], DECODER: ["decoder"]}
WIDTH = 64  # of multi-vectors: another than the model's


class Reference:
    """A generating model with an adapter on it, as PEFT has it."""

    def __init__(self, place: str):
        self.found: RetrievalFolder = read_folder(place)
        model = JinaVLMForConditionalGeneration.from_pretrained(self.found.base, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(model, self.found.path).eval()
        self.processor = self.found.load_processor()

    @torch.no_grad()
    def embed(self, names: list[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Dense vectors [cases, hidden] and multi-vectors [tokens, width] of cases of one role, as one batch."""
        role = cases()[names[0]][0]
        inputs = prepare(self.processor, [cases()[name][1] for name in names], role)
        states = self.model.get_base_model().model(**inputs).last_hidden_state
        mask = inputs["attention_mask"]
        tokens = F.normalize(self.found.projector(states), dim=-1)
        return cut(pool(states, mask)), [one[kept] for one, kept in zip(tokens, mask.bool(), strict=True)]

    def vectors(self, names: list[str] | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of each case alone."""
        found = {}
        for name in names or cases():
            dense, (multi,) = self.embed([name])
            found[name] = dense[0].numpy(), multi.numpy()
        return found


def write_folders(home: Path) -> None:
    processor = JinaVLMProcessor.from_pretrained(CHECKPOINT)
    processor.image_processor.max_tiles = MAX_TILES
    torch.manual_seed(0)
    hidden = JinaVLMForConditionalGeneration.from_pretrained(CHECKPOINT).config.text_config.hidden_size
    projector = nn.Linear(hidden, WIDTH, bias=False)
    for name, parts in PARTS.items():
        model = JinaVLMForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
        model = add_adapters(model, LoraSettings(8, 16, parts=parts))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:  # zeros, which change nothing
                nn.init.normal_(parameter, std=0.02)
            if name == ALL and "lora_" in parameter_name and "connector" not in parameter_name:
                parameter.data = parameter.data.to(torch.float8_e4m3fn)  # as in checkpoints/tiny-retrieval
        write_folder(home / name, model, projector, processor, base=CHECKPOINT)


def main(home: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    write_folders(home)
    for kind in (DENSE, MULTI):
        merge_folder(home / ALL, home / kind, kind, dtype="float32")
    arrays = {}
    for adapter in (ALL, DECODER):
        reference = Reference(str(home / adapter))
        for name, (dense, multi) in reference.vectors().items():
            arrays |= {f"{adapter}/{name}/dense": dense, f"{adapter}/{name}/multi": multi}
    with reference.model.disable_adapter():
        for name, (dense, _) in reference.vectors().items():
            arrays[f"none/{name}/dense"] = dense
    np.savez(home / VECTORS, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
