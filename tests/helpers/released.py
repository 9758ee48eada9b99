"""What a release brings along, and checkpoints in its layout."""

import json
import shutil
from pathlib import Path

import torch
from jina_vlm import JinaVLMForConditionalGeneration
from jina_vlm.conversion_jina_vlm import released_name
from safetensors.torch import save_file


# What its chat template renders, as two ports transcribe it: a space, the role, a colon and a space, then the parts,
# each text with a space behind it; what asks for an answer brings no space of its own
RELEASED_TEMPLATE = (
    "{% for message in messages %}"
    "{{ (' ' if not loop.first or always_start_with_space else '') ~ message['role'] | capitalize ~ ': ' }}"
    "{% set parts = message['content'] %}"
    "{% set parts = [{'type': 'text', 'text': parts}] if parts is string else parts %}"
    "{% for part in parts %}"
    "{{ image_prompt_token if part['type'] == 'image' else part['text'] ~ ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Parts of one released tensor, in their order there
_FUSED = ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj")


def save_released(native: Path, like: Path, folder: Path) -> None:
    """Write the checkpoint `native` in the released layout, with the settings of `like`, a released one, and without a
    chat template."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(native / name, folder / name)
    for name in ("preprocessor_config.json", "processor_config.json"):
        shutil.copyfile(like / name, folder / name)

    model = JinaVLMForConditionalGeneration.from_pretrained(native, dtype="auto")
    config, parts = model.config, {}
    for name, tensor in model.state_dict().items():
        parts.setdefault(released_name(name), []).append((name, tensor))
    for of_one in parts.values():
        of_one.sort(key=lambda part: [kind in part[0] for kind in _FUSED], reverse=True)
    tensors = {name: torch.cat([tensor for _, tensor in of_one]) for name, of_one in parts.items()}
    patches = tensors["model.vision_model.patch_embed.proj.weight"]
    tensors["model.vision_model.patch_embed.proj.weight"] = patches.permute(0, 2, 3, 1).flatten(1).contiguous()
    base = min(config.structural_token_ids)
    embedding = tensors["model.language_model.embedding.embedding"]
    tensors["model.language_model.embedding.embedding"] = embedding[:base].clone()
    tensors["model.language_model.embedding.new_embedding"] = embedding[base:].clone()
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:base].clone()
    for part in ("weight", "bias"):
        tensors[f"model.vision_model.post_lnorm.{part}"] = torch.ones(config.vision_config.hidden_size).to(embedding)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    released = json.loads((like / "config.json").read_text())
    vision, text = config.vision_config, config.text_config
    released |= {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    released["vision_config"] |= {
        "hidden_size": vision.hidden_size,
        "output_size": text.hidden_size,
        "n_layers": vision.num_hidden_layers,
        "vit_layers": config.vision_feature_layers,
    }
    block, connector = (released["vision_config"][name] for name in ("block_config", "vl_connector_config"))
    block["attn_config"] |= {
        "n_heads": vision.num_attention_heads,
        "head_dim": vision.hidden_size // vision.num_attention_heads,
    }
    block["ffn_config"]["size"] = vision.intermediate_size
    connector["attn_pooling_config"] |= {
        "n_heads": config.connector_num_attention_heads,
        "head_dim": config.connector_head_dim,
    }
    connector["mlp_projector_config"]["size"] = config.connector_intermediate_size
    released["text_config"] |= {
        "hidden_size": text.hidden_size,
        "n_layers": text.num_hidden_layers,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "vocab_size": base,
        "embedding_size": base,
        "additional_vocab_size": text.vocab_size - base,
        "max_sequence_length": text.max_position_embeddings,
    }
    released["text_config"]["block_config"]["attn_config"] |= {
        "n_heads": text.num_attention_heads,
        "n_kv_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
    }
    released["text_config"]["block_config"]["ffn_config"]["size"] = text.intermediate_size
    (folder / "config.json").write_text(json.dumps(released))
