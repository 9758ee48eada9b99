"""jina-vlm as VLMEvalKit calls models. It needs VLMEvalKit and transformers alone: the file can also be copied to
`vlmeval/vlm`, and its class named in `vlmeval/config.py`.

Prompts are those that the paper describes (section 5): in English whatever the question's language, for the letter of
the best option alone, or for a very short answer. Their very words are ours: it does not print them.
"""

import string

import pandas as pd
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlmeval.dataset import DATASET_TYPE, MMMUDataset, MUIRDataset
from vlmeval.vlm.base import BaseModel


LETTER = "Answer with the letter of the best option only."
SHORT = "Give a very short answer."
# Their questions say themselves how to answer, each in its own way.
OWN_PROMPTS = ("CharXiv", "MathVista")
# Where in its text a question has its images, if it says so
SPLITTERS = {"MMMU": MMMUDataset.split_MMMU, "MUIR": MUIRDataset.split_MUIR}


class JinaVLM(BaseModel):
    """
    Args:
        model_path (`str`): A native checkpoint: a folder or a repository of the Hub.
        dtype (`str`, *optional*, defaults to `"bfloat16"`): What is computed in.
        do_resize (`bool`, *optional*, defaults to `True`): `False` chooses grids on the images' own sizes.
        max_tiles (`int`, *optional*): Of an image, in the place of the checkpoint's setting.
        max_new_tokens (`int`, *optional*, defaults to 1024): Where an answer is cut off.
    """

    INTERLEAVE = True
    allowed_types = ["text", "image"]

    def __init__(
        self,
        model_path: str,
        dtype: str = "bfloat16",
        do_resize: bool = True,
        max_tiles: int | None = None,
        max_new_tokens: int = 1024,
    ):
        super().__init__()
        self.max_new_tokens = max_new_tokens
        self.processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=True)
        self.processor.image_processor.do_resize = do_resize
        if max_tiles is not None:
            self.processor.image_processor.max_tiles = max_tiles
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        model = AutoModelForImageTextToText.from_pretrained(model_path, dtype=dtype, trust_remote_code=True)
        self.model = model.to(device).eval()

    def use_custom_prompt(self, dataset: str) -> bool:
        """Whether the prompt is ours, rather than the benchmark's own."""
        return DATASET_TYPE(dataset) in ("MCQ", "VQA", "Y/N") and not dataset.startswith(OWN_PROMPTS)

    def build_prompt(self, line: pd.Series, dataset: str) -> list[dict]:
        """VLMEvalKit's message of a row: images and one text, or both in turns where the question names places."""
        options = [
            f"{letter}. {line[letter]}"
            for letter in string.ascii_uppercase
            if letter in line and pd.notna(line[letter])
        ]
        hint = [line["hint"]] if "hint" in line and pd.notna(line["hint"]) else []
        text = "\n".join([*map(str, (*hint, line["question"])), *options, LETTER if options else SHORT])
        message = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
        message.append({"type": "text", "value": text})
        split = next((split for name, split in SPLITTERS.items() if dataset.startswith(name)), None)
        return split(message) if split else message

    @torch.inference_mode()
    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        """The greedy answer to a message."""
        key = {"image": "path", "text": "text"}
        content = [{"type": part["type"], key[part["type"]]: part["value"]} for part in message]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return self.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
