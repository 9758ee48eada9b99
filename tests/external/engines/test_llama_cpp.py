"""llama.cpp runs the text model: it gives `generate`'s tokens, where nothing but a mistake separates the two.

Both are float32 and greedy here: the GGUF file, keys and values too. A bfloat16 file holds the small checkpoint's own
weights, and is held to the same tokens.
"""

import base64
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import llama_cpp
import pytest
import servers
import torch
from chats import CHATS, NEW, ask_without_converters, converse, drawn, new_tokens, prepare, refused, sampled, user
from gguf import GGUFReader
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from transformers import DynamicCache
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from jina_vlm_tools.cli.main import main
from jina_vlm_tools.engines import llama_text
from jina_vlm_tools.engines.gguf_folder import convert_for_llama_cpp
from jina_vlm_tools.engines.llama_cpp import LlamaCppForConditionalGeneration
from jina_vlm_tools.engines.quantization import VISIONS
from jina_vlm_tools.files import TEMPLATE, TINY
from jina_vlm_tools.inference.conversation import Conversation
from jina_vlm_tools.inference.loading import load_on_device, load_processor_and_class


ROOT = Path(__file__).parents[3]
RELEASED = ROOT / "tests" / "golden" / "released-tiny"


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The function `converted(quantization, weights=TINY, vision="torch")`: a folder for llama.cpp, made once."""
    made = {}

    def convert(quantization: str, weights=TINY, vision: str = "torch"):
        key = (quantization, weights, vision)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{quantization}-{vision}")
            convert_for_llama_cpp(str(weights), made[key], quantization, vision=VISIONS[vision])
        return made[key]

    return convert


@pytest.fixture(scope="session")
def by_llama(converted):
    return LlamaCppForConditionalGeneration.from_pretrained(converted("F32"), dtype=torch.float32).eval()


@pytest.mark.parametrize("name", CHATS)
def test_the_tokens_of_generate(name, processor, by_torch, by_llama):
    inputs = prepare(processor, CHATS[name])
    assert new_tokens(by_llama, inputs) == new_tokens(by_torch, inputs)


def test_the_logits_of_every_place(processor, by_torch, by_llama):
    inputs = prepare(processor, CHATS["two images"])
    words = ~torch.isin(torch.arange(by_torch.config.text_config.vocab_size),
                        torch.tensor(by_torch.config.structural_token_ids))  # fmt: skip
    with torch.no_grad():
        ours, expected = by_llama(**inputs).logits, by_torch(**inputs).logits
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours[..., words], expected[..., words], rtol=0, atol=1e-3)
    some = by_llama(**inputs, logits_to_keep=torch.tensor([-1, 5])).logits
    torch.testing.assert_close(some, ours[:, [-1, 5]])


def test_bfloat16_weights_give_the_same_tokens(converted, processor, by_torch):
    model = LlamaCppForConditionalGeneration.from_pretrained(converted("BF16"), dtype=torch.float32).eval()
    for chat in CHATS.values():
        inputs = prepare(processor, chat)
        assert new_tokens(model, inputs) == new_tokens(by_torch, inputs)


def test_a_batch_of_different_lengths(processor, by_torch, by_llama):
    chats = [CHATS[name] for name in ("no image", "two images", "turns", "one image, color, de")]
    inputs = prepare(processor, *chats)
    assert new_tokens(by_llama, inputs) == new_tokens(by_torch, inputs)
    apart = [new_tokens(by_llama, prepare(processor, chat))[0] for chat in chats]
    end = processor.tokenizer.eos_token_id
    for one, together in zip(apart, new_tokens(by_llama, inputs), strict=True):
        assert together[: len(one)] == one and set(together[len(one) :]) <= {end}


def test_sampling_has_the_options_of_generate(processor, by_torch, by_llama):
    inputs = prepare(processor, CHATS["turns"])
    answers = [sampled(model, inputs) for model in (by_torch, by_llama)]
    assert answers[0] == answers[1] and len({tuple(answer) for answer in answers[0]}) > 1


def test_structural_tokens_are_never_sampled(processor, by_llama):
    torch.manual_seed(0)
    inputs = prepare(processor, CHATS["no image"])
    drawn_ids = new_tokens(by_llama, inputs, do_sample=True, temperature=1e6, max_new_tokens=400, min_new_tokens=400)
    assert not {*drawn_ids[0]} & {*by_llama.config.structural_token_ids}


def test_turns_go_on_from_the_cache(processor, by_torch, by_llama, monkeypatch):
    conversation, answers = converse(by_llama, processor)
    assert answers == converse(by_torch, processor)[1]

    read, encoded = [], []
    sequences = conversation.cache.layers[0].sequences
    monkeypatch.setattr(type(sequences), "read", _noting(read, type(sequences).read))
    features = by_llama.model.vision_model.register_forward_hook(lambda *_: encoded.append(1))
    answer = conversation.answer("Describe the picture.", [])
    features.remove()
    assert not encoded and read[0] < 40 < answer.prompt_tokens  # the new turn alone


def _noting(read: list, function):
    def note(sequences, places):
        read.append(len(places))
        return function(sequences, places)

    return note


def test_what_was_read_moves_to_larger_rooms(processor, by_llama, monkeypatch):
    inputs = prepare(processor, CHATS["no image"], CHATS["turns"])
    options = {"max_new_tokens": 300, "min_new_tokens": 300}
    moved = new_tokens(by_llama, inputs, **options)
    monkeypatch.setattr(llama_text, "GROWTH", 4096)
    monkeypatch.setattr(llama_text.Sequences, "_copy_to", None)
    assert new_tokens(by_llama, inputs, **options) == moved


def test_a_larger_room_that_cannot_be_filled_is_given_back(processor, by_llama, monkeypatch):
    inputs, cache = prepare(processor, CHATS["no image"]), by_llama.new_cache()
    by_llama(**inputs, cache=cache)
    freed, free = [], llama_cpp.llama_free
    monkeypatch.setattr(llama_cpp, "llama_free", lambda context: (freed.append(context), free(context)))
    monkeypatch.setattr(llama_cpp, "llama_state_seq_set_data", lambda *_: 0)
    before = cache.layers[0].sequences.context
    with refused("cannot move what it has read", RuntimeError):
        cache.layers[0].sequences.reserve(4096)
    assert len(freed) == 1 and freed[0] != before == cache.layers[0].sequences.context


def test_without_a_cache(processor, by_torch, by_llama):
    inputs = prepare(processor, CHATS["two images"], CHATS["no image"])
    for use_cache in (False, 0, None):
        assert new_tokens(by_llama, inputs, use_cache=use_cache) == new_tokens(by_torch, inputs)


def test_streams_the_answer(processor, by_llama):
    pieces = []
    answer = Conversation(by_llama, processor, NEW).answer("Describe the picture.", [drawn(1)], pieces.append)
    assert len(pieces) > 1 and "".join(pieces).strip() == answer.text


# ---------------------------------------------------------------------------------------------------------------------
# Tower and connector as graphs
# ---------------------------------------------------------------------------------------------------------------------

GRAPHS = ["onnx", "openvino"]


@pytest.mark.parametrize("vision", GRAPHS)
def test_the_tokens_of_generate_with_a_graph_as_tower(vision, converted, processor, by_torch):
    folder = converted("F32", vision=vision)
    model = LlamaCppForConditionalGeneration.from_pretrained(folder)
    assert model.num_parameters() == len(model.config.structural_token_ids) * model.config.text_config.hidden_size
    for chat in CHATS.values():
        inputs = prepare(processor, chat)
        assert new_tokens(model, inputs) == new_tokens(by_torch, inputs)


@pytest.mark.parametrize("vision", [f"{engine}-{kind}" for engine in GRAPHS for kind in ("int8", "int8-a8")])
def test_quantized_towers(vision, converted, processor, by_torch):
    folder = converted("Q8_0", vision=vision)
    model = LlamaCppForConditionalGeneration.from_pretrained(folder)
    inputs = prepare(processor, CHATS["two images"])
    given = [inputs[name] for name in ("pixel_values", "tile_positions")]
    with torch.no_grad():
        ours, expected = (torch.cat(each.get_image_features(*given).pooler_output) for each in (model, by_torch))
    assert 0 < (ours - expected).norm() / expected.norm() < 0.1
    assert new_tokens(model, inputs) == new_tokens(by_torch, inputs)
    sizes = [
        sum(path.stat().st_size for path in made.glob("tower.*"))
        for made in (folder, converted("F32", vision=VISIONS[vision].engine))
    ]
    assert sizes[0] < sizes[1] / 2


@pytest.mark.parametrize(
    "vision, graph, other", [("onnx", "tower.onnx", "bfloat16"), ("openvino", "connector.xml", "float16")]
)
def test_a_graph_that_is_missing_and_a_type_that_it_does_not_compute_in(vision, graph, other, converted, tmp_path):
    with refused(f"{vision} computes in float32.*, not in {other}"):
        LlamaCppForConditionalGeneration.from_pretrained(converted("F32", vision=vision), dtype=other)
    shutil.copytree(converted("F32", vision=vision), tmp_path, dirs_exist_ok=True)
    (tmp_path / graph).write_bytes(b"no graph")
    with refused(f"cannot load .*{graph}", OSError):
        LlamaCppForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / graph).unlink()
    with refused(f"has no {graph}. Convert the checkpoint again", OSError):
        LlamaCppForConditionalGeneration.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_the_file_alone_answers_text_in_llama_cpp(converted, processor, by_torch):
    inputs = prepare(processor, [user("What is the capital of France?")])
    alone = llama_cpp.Llama(str(converted("F32") / "text-F32.gguf"), n_ctx=512, n_threads=1, verbose=False)
    text = processor.decode(inputs["input_ids"][0, 1:])
    given = alone.create_completion(text, max_tokens=NEW, temperature=0)  # it adds <|endoftext|> itself
    assert alone.tokenize(text.encode(), special=True) == inputs["input_ids"][0].tolist()
    expected = processor.batch_decode(new_tokens(by_torch, inputs), skip_special_tokens=True)[0]
    assert given["choices"][0]["text"] == expected
    chat = alone.create_chat_completion(
        [{"role": "user", "content": "What is the capital of France?"}], max_tokens=NEW, temperature=0
    )
    assert chat["choices"][0]["message"]["content"] == expected
    assert chat["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]


def test_the_released_layout(converted):
    folder = converted("F32", RELEASED)
    expected = JinaVLMForConditionalGeneration.from_pretrained(RELEASED, dtype=torch.float32).eval()
    model = LlamaCppForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = JinaVLMProcessor.from_pretrained(folder)
    assert processor.chat_template == TEMPLATE.read_text()
    for chat in ([user("What?")], [user(drawn(1), "What?")]):
        inputs = prepare(processor, chat)
        assert new_tokens(model, inputs) == new_tokens(expected, inputs)


@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_K_M", "Q3_K_M"])
def test_quantized_types(quantization, converted, processor, by_torch):
    """Rows of 128 are no multiple of 256: llama.cpp gives them another type than Q4_K by itself."""
    folder = converted(quantization)
    tensors = GGUFReader(folder / f"text-{quantization}.gguf").tensors
    kinds = {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1}
    assert kinds == {"Q8_0": {"Q8_0"}, "Q4_K_M": {"Q8_0", "Q5_0", "Q4_K"}}.get(quantization, kinds)
    assert not kinds & {"F32", "F16", "BF16"}
    model = LlamaCppForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = prepare(processor, CHATS["two images"])
    words = slice(0, min(by_torch.config.structural_token_ids))
    with torch.no_grad():
        given, expected = (m(**inputs, logits_to_keep=1).logits[0, 0, words].softmax(0) for m in (model, by_torch))
    divergence = (expected * (expected / given).log()).sum()
    assert divergence < {"Q8_0": 1e-3}.get(quantization, 0.2)


def test_tensors_are_written_one_by_one(converted):
    """Matrices have the checkpoint's bits; rows of structural tokens are covered in the head, as in other folders."""
    model = JinaVLMForConditionalGeneration.from_pretrained(TINY, dtype="auto")
    tensors = {tensor.name: tensor for tensor in GGUFReader(converted("BF16") / "text-BF16.gguf").tensors}
    assert len(tensors) == len(model.model.language_model.state_dict()) + 1

    def bits(name: str) -> torch.Tensor:
        return torch.from_numpy(tensors[name].data.copy()).view(torch.bfloat16)

    layer = model.model.language_model.layers[2]
    assert bits("blk.2.attn_k.weight").equal(layer.self_attn.k_proj.weight)
    assert bits("blk.2.ffn_gate.weight").equal(layer.mlp.gate_proj.weight)
    assert bits("token_embd.weight").equal(model.model.language_model.embed_tokens.weight)
    head, structural = bits("output.weight"), model.config.structural_token_ids
    assert head[: min(structural)].equal(model.lm_head.weight[: min(structural)])
    assert all(head[index].equal(head[min(structural) - 1]) for index in structural)


def test_a_text_model_of_another_checkpoint_is_refused(converted, tmp_path):
    for path in converted("F32").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "text-F32.gguf").unlink()
    (tmp_path / "text-F32.gguf").symlink_to(converted("F32", RELEASED) / "text-F32.gguf")
    with refused("expected 2176 and 128: it is of another checkpoint"):
        LlamaCppForConditionalGeneration.from_pretrained(tmp_path)


def test_damaged_and_missing_files(converted, tmp_path):
    for path in converted("F32").iterdir():
        (tmp_path / path.name).write_bytes(
            path.read_bytes()[:100_000] if path.suffix == ".gguf" else path.read_bytes()
        )
    with refused("llama.cpp cannot load .*text-F32.gguf: .*", OSError):
        LlamaCppForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / "text-F32.gguf").unlink()
    with refused("text-F32.gguf", OSError):
        LlamaCppForConditionalGeneration.from_pretrained(tmp_path)


def test_what_it_does_not_do_is_refused(processor, by_llama):
    inputs = prepare(processor, CHATS["two images"])
    for change, message in (
        ({"labels": inputs["input_ids"]}, "does not train"),
        ({"output_hidden_states": True}, "leave `output_hidden_states` out"),
        ({"cache": DynamicCache()}, "Expected a cache of `new_cache"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 4, 128)}, "texts are tokens"),
        ({"attention_mask": torch.zeros(1, 3)}, "Expected `attention_mask`"),
        (
            {"attention_mask": 1 - inputs["attention_mask"].cumsum(1) // inputs["input_ids"].shape[1]},
            "padded on the left",
        ),
        ({"input_ids": inputs["input_ids"][:, 40:], "attention_mask": None}, "places"),
        (
            {"position_ids": torch.arange(5, 5 + inputs["input_ids"].shape[1])[None]},
            "`position_ids` has 5 where 0 was expected: .*Leave it out",
        ),
    ):
        with refused(message):
            by_llama(**{**inputs, **change})
    with refused("Beam search is not supported", NotImplementedError):
        by_llama.generate(**inputs, num_beams=2, max_new_tokens=2)


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """As the command makes it, and asks it in a fresh process."""
    folder = tmp_path_factory.mktemp("command") / "for-llama"
    main(["convert", str(TINY), str(folder), "--to", "gguf", "--quantize", "f32"])
    return folder


def test_convert_makes_a_whole_folder(folder, capsys):
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "processor_config.json",
        "text-F32.gguf", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="is not empty"):
        main(["convert", str(TINY), str(folder), "--to", "gguf"])


def test_ask_and_chat(folder, tmp_path, capsys, monkeypatch):
    image = tmp_path / "shapes.png"
    drawn(1).save(image)
    reports = {}
    for name, model in (("torch", TINY), ("llama.cpp", folder)):
        main(["ask", str(image), "Describe the picture.", "--model", str(model), "--engine", name, "--json"])
        reports[name] = json.loads(capsys.readouterr().out)
    ours, expected = reports["llama.cpp"], reports["torch"]
    assert {key: ours[key] for key in ("answer", "tokens", "images", "engine")} == {
        **{key: expected[key] for key in ("answer", "tokens", "images")},
        "engine": "llama.cpp",
    }
    assert ours["seconds"]["first_token"] > 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("Describe the picture.\nHow many shapes are there?\n"))
    main(["chat", str(image), "--model", str(folder), "--json"])
    answers = [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]
    processor, load_model = load_processor_and_class(str(TINY))
    conversation = Conversation(load_on_device(load_model, "cpu"), processor, 256)
    expected = [
        conversation.answer("Describe the picture.", [drawn(1)]),
        conversation.answer("How many shapes are there?", []),
    ]
    assert answers == [answer.text for answer in expected]


def test_to_run_it_needs_one_package(folder, tmp_path):
    drawn(1).save(tmp_path / "shapes.png")
    report = ask_without_converters("llama", tmp_path / "shapes.png", "How many shapes are there?", "--model", folder)
    assert report["answer"] and report["engine"] == "llama.cpp"


def test_batch(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "images").mkdir()
    for seed, width in ((1, 300), (2, 700), (3, 378)):
        drawn(seed, width).save(tmp_path / "images" / f"{seed}.png")
    answers = {}
    for model in (TINY, folder):
        output = tmp_path / model.name
        main(
            [
                "batch",
                str(tmp_path / "images"),
                "--output",
                str(output),
                "--model",
                str(model),
                "--format",
                "jsonl",
                "--question",
                "How many shapes are there?",
            ]
        )
        rows = [json.loads(line) for path in output.rglob("*.jsonl") for line in path.read_text().splitlines()]
        answers[model] = {row["id"]: row["answer"] for row in rows}
    assert answers[folder] == answers[TINY] and len(answers[TINY]) == 3


def test_serve(folder, tmp_path, processor, by_torch):
    openai = pytest.importorskip("openai")
    port, content = servers.free_port(), io.BytesIO()
    drawn(1).save(content, "PNG")
    command = [sys.executable, "-m", "jina_vlm_tools", "serve", str(folder), "--engine", "llama.cpp"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1"}
    url = f"http://127.0.0.1:{port}"
    uri = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "Describe the picture."}]
    request = {"model": str(folder), "messages": [{"role": "user", "content": parts}], "temperature": 0}
    inputs = prepare(processor, [user(drawn(1), "Describe the picture.")])
    expected = processor.batch_decode(new_tokens(by_torch, inputs, max_new_tokens=24), skip_special_tokens=True)[0]
    with (
        servers.running(command, f"{url}/health", tmp_path / "log", seconds=300, cwd=ROOT, env=environment),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client,
    ):
        whole = client.chat.completions.create(**request, max_tokens=24)
        assert whole.choices[0].message.content.strip() == expected.strip()
        stream = list(client.chat.completions.create(**request, max_tokens=24, stream=True))
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces).strip() == expected.strip() and len([piece for piece in pieces if piece]) > 1
        with pytest.raises(openai.BadRequestError) as refusal:
            client.chat.completions.create(**{**request, "messages": [{"role": "user", "content": [{"type": "x"}]}]})
        assert "jina-vlm takes text and images" in refusal.value.body["detail"]


def copy_with(folder: Path, name: str, change) -> Path:
    """The small checkpoint, one of whose files of settings is changed."""
    for path in TINY.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / name).read_text())
    change(settings)
    (folder / name).write_text(json.dumps(settings))
    return folder


def split_as_qwen(tokenizer: dict) -> None:
    tokenizer["normalizer"] = {"type": "NFC"}
    pattern = {"Regex": PRETOKENIZE_REGEX}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}


def test_the_released_tokenizers_way_of_splitting(tmp_path):
    """`convert` compares llama.cpp's tokens with the checkpoint's. Digits and line ends differ from GPT-2's."""
    folder = tmp_path / "made"
    folder.mkdir()
    (tmp_path / "given").mkdir()
    given = copy_with(tmp_path / "given", "tokenizer.json", split_as_qwen)
    convert_for_llama_cpp(str(given), folder, "F32")
    alone = llama_cpp.Llama(str(folder / "text-F32.gguf"), vocab_only=True, verbose=False)
    assert alone.metadata["tokenizer.ggml.pre"] == "qwen2"
    text = "In 2,026 there were 12345\n\n\nlines'll"
    expected = JinaVLMProcessor.from_pretrained(given).tokenizer(text, add_special_tokens=False)["input_ids"]
    assert alone.tokenize(text.encode(), add_bos=False) == expected
    plain = JinaVLMProcessor.from_pretrained(TINY).tokenizer(text, add_special_tokens=False)["input_ids"]
    assert plain != expected


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer.json", lambda t: t["pre_tokenizer"].update(use_regex=False), "expected Qwen3's or GPT-2's"),
        ("tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"}), "normalizes by .*Lowercase"),
        ("config.json", lambda c: c["text_config"].update(hidden_act="gelu"), "`hidden_act` 'gelu'"),
        (
            "config.json",
            lambda c: c["text_config"]["rope_parameters"].update(rope_type="linear", factor=2.0),
            "`rope_parameters`",
        ),
    ],
    ids=["split", "normalizer", "activation", "rotary scaling"],
)
def test_what_llama_cpp_cannot_do_is_refused_and_nothing_left(name, change, message, tmp_path, capsys):
    (tmp_path / "given").mkdir()
    given = copy_with(tmp_path / "given", name, change)
    with pytest.raises(SystemExit, match=message):
        main(["convert", str(given), str(tmp_path / "made"), "--to", "gguf"])
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(SystemExit, match=r"is too small: 0.00 GB are free, 0.07 GB are needed"):
        main(["convert", str(TINY), str(tmp_path / "made"), "--to", "gguf", "--quantize", "Q4_K_M"])
    assert not list(tmp_path.iterdir())


def test_yes_replaces_a_folder_for_llama_cpp(tmp_path, capsys):
    main(["convert", str(TINY), str(tmp_path / "made"), "--to", "gguf", "--quantize", "Q8_0", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["tensors"] == {"Q8_0": 23, "F32": 13} and report["answer"]
    main(["convert", str(TINY), str(tmp_path / "made"), "--to", "gguf", "--quantize", "F16", "--yes"])
    assert {path.name for path in (tmp_path / "made").glob("*.gguf")} == {"text-F16.gguf"}
