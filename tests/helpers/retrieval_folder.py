"""A retrieval folder as `write_folder` writes one, without sentence-transformers: its files for that library as they
were in 6.2.0."""

import json
from pathlib import Path

import jina_vlm
import torch
from safetensors.torch import save_file

from jina_vlm_tools.training.lora import add_adapters
from jina_vlm_tools.training.stages import LoraSettings


METHOD = {"method": "forward", "method_output_name": "last_hidden_state"}
TEXTS = "sentence_transformers.base.modules."
MULTI = "sentence_transformers.multi_vector_encoder.modules."


def save_retrieval_folder(folder: Path, base: Path, name: str, parts: tuple[str, ...] = ("decoder",)) -> Path:
    """An adapter of fixed random weights for the checkpoint `base`, which it names `name`, and a projector of width
    16."""
    torch.manual_seed(0)
    model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(base)
    hidden = model.config.text_config.hidden_size
    model = add_adapters(model, LoraSettings(4, 8, parts=list(parts)))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:  # zeros, which change nothing
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    settings = json.loads((folder / "adapter_config.json").read_text())
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(base)
    processor.image_processor.max_tiles = 4
    processor.save_pretrained(folder)
    files = {
        "adapter_config.json": settings | {"base_model_name_or_path": name, "inference_mode": True},
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": TEXTS + "transformer.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Dense", "type": TEXTS + "dense.Dense"},
            {"idx": 2, "name": "2", "path": "2_MultiVectorMask", "type": MULTI + "multi_vector_mask.MultiVectorMask"},
            {"idx": 3, "name": "3", "path": "3_Normalize", "type": TEXTS + "normalize.Normalize"},
        ],
        "config_sentence_transformers.json": {
            "default_prompt_name": None,
            "model_type": "MultiVectorEncoder",
            "prompts": {"query": "Query:", "document": "Passage:"},
            "similarity_fn_name": None,
            "task": "retrieval",
        },
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": METHOD, "image": METHOD, "message": METHOD | {"format": "structured"}},
            "module_output_name": "token_embeddings",
            "processing_kwargs": {"chat_template": {"tiles_by_sample": True}},
        },
        "1_Dense/config.json": {
            "in_features": hidden,
            "out_features": 16,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
            "module_input_name": "token_embeddings",
            "module_output_name": "token_embeddings",
        },
        "2_MultiVectorMask/config.json": {
            "skiplist_words": [],
            "skiplist_tasks": ["document"],
            "keep_only_token_ids": None,
        },
        "3_Normalize/config.json": {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"},
    }
    for file, content in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(content))
    projector = torch.randn(16, hidden)
    save_file({"linear.weight": projector}, folder / "1_Dense" / "model.safetensors", metadata={"format": "pt"})
    return folder
