"""Make of a checkpoint a folder for transformers.js: three graphs, settings and tokenizer, and a page that answers by
them."""

import json
import shutil
from pathlib import Path

import torch
from jina_vlm import JinaVLMConfig, JinaVLMForConditionalGeneration, JinaVLMProcessor

from jina_vlm_tools.hub import PublishingError

from . import BROWSER, CONVERTED_TYPE, ONNX
from .folder import (
    NEW_TOKENS,
    QUESTION,
    check_room,
    complete,
    draw_image,
    load_checkpoint,
    write_processor,
    writing,
)
from .graph_folder import bits_of, check_architecture, count_bytes, describe
from .graph_parts import cache_names
from .graph_runners import OnnxGraph
from .graph_weights import write_graph
from .graphs import BROWSER_PARTS, PARTS, Drawing, draw


PAGE = Path(__file__).parents[1] / "webapp" / "browser"
GRAPHS = "onnx"  # the folder in which transformers.js looks for them
DATA = "_data"
# transformers.js's names of kinds of weights, and what it adds to the names of their files
DTYPES = {None: "fp32", "int8": "q8", "int4": "q4"}
SUFFIXES = {"fp32": "", "q8": "_quantized", "q4": "_q4"}


def convert_for_browser(weights: str, folder: Path, quantization: str | None = None) -> dict[str, str]:
    """
    Write a checkpoint into `folder`, for transformers.js.

    Args:
        weights: A folder or an id of the Hub, in the released layout or this one.
        folder: An empty one.
        quantization: One of `BROWSER_QUANTIZATIONS`; None for float32.

    Returns:
        What the weights of each graph are.

    Raises:
        PublishingError: the disk is too small or full.
        OSError, ValueError: the checkpoint cannot be read, or does what a graph cannot; the message names it.
    """
    model, processor = load_checkpoint(weights)
    return write_for_browser(model, processor, folder, quantization)


def write_for_browser(
    model: JinaVLMForConditionalGeneration, processor: JinaVLMProcessor, folder: Path, quantization: str | None = None
) -> dict[str, str]:
    """As [`convert_for_browser`], of a model and a processor. The model's rows for structural tokens are covered."""
    check_architecture(model.config, ONNX, quantization)
    complete(model, processor)
    check_room(folder, count_bytes(model, list(PARTS), ONNX, quantization))
    dtype = DTYPES[quantization]
    kinds = {}
    with writing(folder):
        (folder / GRAPHS).mkdir()
        for name in BROWSER_PARTS:
            part = {"decoder_model_merged": "decoder", "embed_tokens": "embedding"}.get(name, name)
            drawing = draw(model, name)
            if part == "embedding" and quantization is None:  # WebAssembly has no cast from bfloat16
                drawing = Drawing(drawing.graph, {key: rows.float() for key, rows in drawing.matrices.items()})
            path = folder / GRAPHS / f"{name}{SUFFIXES[dtype]}.onnx"
            write_graph(drawing, path, bits_of(part, quantization), DATA)
            kinds[name] = describe(part, quantization) if quantization else "float32"
        _write_config(model.config, folder, dtype)
        write_processor(model, processor, folder)
        _move_template(folder)
        for file in PAGE.iterdir():
            shutil.copyfile(file, folder / file.name)
    return kinds


def _write_config(config: JinaVLMConfig, folder: Path, dtype: str) -> None:
    """Write a config by which transformers.js takes the folder for LLaVA's: graphs for images, tokens and decoder."""
    text = config.text_config
    settings = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        CONVERTED_TYPE: BROWSER.model_type,
        "image_token_index": config.image_token_id,
        "max_position_embeddings": text.max_position_embeddings,
        "text_config": text.to_dict(),
        "vision_config": config.vision_config.to_dict(),
        "transformers.js_config": {"dtype": dtype, "use_external_data_format": True},
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _move_template(folder: Path) -> None:
    """Put the chat template where transformers.js reads it."""
    template, path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["chat_template"] = template.read_text(encoding="utf-8")
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    template.unlink()


def ask_graphs(folder: Path) -> str:
    """
    The answer that the graphs of a folder give to a drawn image, by ONNX Runtime.

    Raises:
        PublishingError: it is empty.
    """
    processor = JinaVLMProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": draw_image()}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        max_tiles=1,
    )
    answer = processor.decode(generate(folder, inputs, NEW_TOKENS), skip_special_tokens=True).strip()
    if not answer:
        raise PublishingError(f"The graphs for {folder.name} load, but with an empty answer.")
    return answer


def generate(folder: Path, inputs: dict[str, torch.Tensor], new_tokens: int) -> list[int]:
    """Continue the prompt of one sample with images by its likeliest tokens, as transformers.js does."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text, suffix = config["text_config"], SUFFIXES[config["transformers.js_config"]["dtype"]]
    paths = [folder / GRAPHS / f"{name}{suffix}.onnx" for name in BROWSER_PARTS]
    encode, embed, decode = (OnnxGraph(str(path), "float32") for path in paths)
    (embeds,) = embed({"input_ids": inputs["input_ids"]})
    (features,) = encode({name: inputs[name] for name in ("pixel_values", "tile_positions")})
    embeds[inputs["input_ids"] == config["image_token_index"]] = features
    layers = text["num_hidden_layers"]
    past = [torch.zeros(1, text["num_key_value_heads"], 0, text["head_dim"])] * (2 * layers)
    tokens: list[int] = []
    while True:
        held = past[0].shape[2]
        length = held + embeds.shape[1]
        given = {
            "inputs_embeds": embeds,
            "attention_mask": torch.ones(1, length, dtype=torch.int64),
            "position_ids": torch.arange(held, length)[None],
            "num_logits_to_keep": torch.tensor(1),
            **dict(zip(cache_names("past_key_values", layers), past, strict=True)),
        }
        logits, *past = decode(given)
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == text["eos_token_id"] or len(tokens) == new_tokens:
            return tokens
        (embeds,) = embed({"input_ids": torch.tensor([tokens[-1:]])})
