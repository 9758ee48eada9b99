"""Write the text model as a GGUF file, of llama.cpp's Qwen3: sizes, vocabulary, chat template and weights."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor

from .llama_text import collect_errors
from .quantization import WHOLE


QUANTIZER_MEMORY = 2**28  # bytes of a matrix's rows that it holds at a time
# How tokenizers split text before they merge bytes: llama.cpp's name for it, by the pattern of a `Split`. `ByteLevel`
# with its own pattern is GPT-2's.
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NORMALIZERS = (None, "NFC")  # llama.cpp has none; composed text is equal either way
# Text on which llama.cpp's tokenizer must agree with the checkpoint's
_SAMPLES = (
    "Describe the picture.",
    " How many red circles are there? It's 1,234 or so;  two  spaces,\n\na line\tand a tab!",
    "Wie viele Häuser stehen in der Straße? ¿Qué color tiene el círculo? Où est-ce, l’été dernier?",
    "日本語のテキスト、中文句子。 한국어 문장 العربية हिन्दी Привет 🙂👩‍🚀",
    "def f(x): return x**2  # 3.14e-10 <tag> {'a': [1, 2]}",
)
_TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}


def write_text_model(
    model: JinaVLMForConditionalGeneration, processor: JinaVLMProcessor, path: Path, name: str, quantization: str
) -> dict[str, int]:
    """
    Write the text model and its head, tensor by tensor.

    Args:
        path: Of the new file. One with the weights as they are lies beside it while a quantized one is written.
        name: Of the checkpoint, for people.
        quantization: One of `QUANTIZATIONS`.

    Returns:
        How many tensors have which type of llama.cpp's.

    Raises:
        ValueError: llama.cpp's Qwen3 or its tokenizer cannot do what this checkpoint does.
        OSError: the file cannot be written, or llama.cpp's quantizer refuses; with what it said.
    """
    _check_architecture(model.config)
    vocabulary = _describe_vocabulary(processor, model.config.text_config.vocab_size)
    if quantization in WHOLE:
        _write(model, processor, vocabulary, path, name, getattr(torch, WHOLE[quantization]))
    else:
        unquantized = path.with_name(f"{path.stem}.unquantized.gguf")
        _write(model, processor, vocabulary, unquantized, name, None)
        _quantize(unquantized, path, quantization)
        unquantized.unlink()
    _check_tokenizer(path, processor)
    return dict(Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors))


def _check_architecture(config) -> None:
    text = config.text_config
    rope = text.rope_parameters or {}
    for what, is_wrong in (
        (f"`rope_parameters` {rope}", rope.get("rope_type", "default") != "default"),
        ("`attention_bias`", text.attention_bias),
        ("`use_sliding_window`", text.use_sliding_window),
        (f"`hidden_act` {text.hidden_act!r}", text.hidden_act != "silu"),
    ):
        if is_wrong:
            raise ValueError(f"The text model has {what}, which is not written for llama.cpp's Qwen3.")


def _describe_vocabulary(processor: JinaVLMProcessor, size: int) -> dict:
    """Tokens, their types, merges and llama.cpp's name for how text is split."""
    tokenizer = processor.tokenizer
    parsed = json.loads(tokenizer.backend_tokenizer.to_str())
    if parsed["model"]["type"] != "BPE":
        raise ValueError(f"The tokenizer is of the kind {parsed['model']['type']}; expected BPE, as Qwen3's.")
    normalizer = (parsed["normalizer"] or {}).get("type")
    split = _name_split(parsed["pre_tokenizer"])
    if normalizer not in _NORMALIZERS or split is None:
        raise ValueError(
            f"The tokenizer normalizes by {parsed['normalizer']} and splits by {json.dumps(parsed['pre_tokenizer'])}; "
            "expected Qwen3's or GPT-2's, which llama.cpp knows."
        )
    tokens = {index: token for token, index in parsed["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in parsed["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if max(tokens) >= size:
        raise ValueError(f"The tokenizer has the id {max(tokens)}, beyond the model's vocabulary of {size}.")
    merges = parsed["model"]["merges"]
    return {
        "tokens": [tokens.get(index, f"[PAD{index}]") for index in range(size)],
        "types": [types.get(index, gguf.TokenType.UNUSED) for index in range(size)],
        "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges],
        "split": split,
    }


def _name_split(pre_tokenizer: dict | None) -> str | None:
    parts = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    kinds = [part.get("type") for part in parts]
    if kinds[-1] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return None
    if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not parts[1]["use_regex"]:
        is_known = parts[0]["pattern"] == {"Regex": _QWEN2_PATTERN} and parts[0]["behavior"] == "Isolated"
        return "qwen2" if is_known and not parts[0]["invert"] else None
    return None


def _write(model, processor, vocabulary: dict, path: Path, name: str, dtype: torch.dtype | None) -> None:
    """Matrices of `dtype`, or of their own; vectors of float32, which is what llama.cpp computes with."""
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3])
    try:
        _add_settings(writer, model, processor, vocabulary, name, dtype)
        tensors = list(_name_tensors(model))
        for tensor_name, tensor in tensors:
            kind = _TYPES[tensor.dtype if dtype is None else dtype] if tensor.ndim > 1 else _TYPES[torch.float32]
            count = tensor.numel() * (4 if kind == gguf.GGMLQuantizationType.F32 else 2)
            writer.add_tensor_info(tensor_name, list(tensor.shape), np.dtype(np.float32), count, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in tensors:
            cast = tensor.to(torch.float32 if tensor.ndim == 1 else dtype or tensor.dtype).contiguous()
            writer.write_tensor_data(cast.flatten().view(torch.uint8).numpy())
    finally:
        writer.close()


def _add_settings(writer: gguf.GGUFWriter, model, processor, vocabulary: dict, name: str, dtype) -> None:
    text, tokenizer = model.config.text_config, processor.tokenizer
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    file_types = {
        torch.float32: gguf.LlamaFileType.ALL_F32,
        torch.float16: gguf.LlamaFileType.MOSTLY_F16,
        torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
    }
    writer.add_file_type(file_types[dtype or model.dtype])
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    writer.add_vocab_size(text.vocab_size)

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["split"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(False)
    # Transformers' marks for what is trained on mean nothing elsewhere; as comments they leave the same spaces.
    template = re.sub(r"\{%(-?)\s*(end)?generation\s*(-?)%\}", r"{#\1 \2generation \3#}", processor.chat_template)
    writer.add_chat_template(template)


def _name_tensors(model: JinaVLMForConditionalGeneration) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the text model and its head, with llama.cpp's names."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, model.config.text_config.num_hidden_layers)
    for ours, tensor in model.model.language_model.state_dict().items():
        theirs = names.get_name(f"model.{ours}", try_suffixes=(".weight",))
        if theirs is None:
            raise ValueError(f"llama.cpp's Qwen3 has no tensor like `{ours}`.")
        yield theirs, tensor
    if not model.config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight.detach()


def _quantize(source: Path, target: Path, quantization: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization}")
    params.nthread = torch.get_num_threads()
    params.max_buf_size = QUANTIZER_MEMORY
    with collect_errors() as errors:
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    if code:
        raise OSError(f"llama.cpp's quantizer fails at {quantization}: {' '.join(errors) or f'code {code}'}")


def _check_tokenizer(path: Path, processor: JinaVLMProcessor) -> None:
    """
    Raises:
        ValueError: llama.cpp reads text by other tokens than the checkpoint's tokenizer.
    """
    with collect_errors():
        alone = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in _SAMPLES:
        given = alone.tokenize(text.encode(), add_bos=False, special=False)
        expected = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        if given != expected:
            raise ValueError(f"llama.cpp reads {text!r} as the tokens {given}, expected {expected}.")
