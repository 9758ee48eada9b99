"""ms-swift's command with `examples/ms_swift_plugin.py`: it trains on what our processor and collator make."""

import pytest
import torch
from conftest import PLUGIN
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from rows import CHECKPOINT, Row
from safetensors.torch import load_file
from swift.model import get_processor
from swift.template import get_template
from swift.utils import import_external_file

from jina_vlm_tools.training import JinaVLMCollator
from jina_vlm_tools.training.trainer import part_of


ALL_PARTS = ("--freeze_llm", "false", "--freeze_vit", "false", "--freeze_aligner", "false")


@pytest.fixture(scope="module")
def full(swift):
    """Two steps of two batches of three rows each: a step sees every row once."""
    return swift(
        "sft", "--tuner_type", "full", *ALL_PARTS, "--max_steps", "2", "--per_device_train_batch_size", "3",
        "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3",
    )  # fmt: skip


@pytest.fixture(scope="module")
def adapter(swift):
    return swift(
        "sft", "--tuner_type", "lora", *ALL_PARTS, "--max_steps", "2", "--per_device_train_batch_size", "6",
        "--learning_rate", "1e-2",
    )  # fmt: skip


@pytest.fixture(scope="module")
def grpo(swift):
    """Two generations of two answers to each of four questions, in two batches."""
    return swift(
        "rlhf", "--rlhf_type", "grpo", "--tuner_type", "lora", *ALL_PARTS, "--max_steps", "4",
        "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--steps_per_generation", "2",
        "--num_generations", "2", "--max_completion_length", "12", "--temperature", "1", "--beta", "0.04",
        "--reward_funcs", "letters", "exact_match", "--learning_rate", "1e-2",
    )  # fmt: skip


def attended(inputs: dict) -> list[tuple[int, ...]]:
    """The ids of each row, without padding."""
    return [
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]


def check_batches(run, rows: list[Row], processor) -> None:
    collator = JinaVLMCollator(processor)
    row_of = {attended(collator([{"messages": row.chat}]))[0]: row for row in rows}
    assert len(row_of) == len(rows)
    seen = set()
    for record in run.records:
        given = record["inputs"]
        found = [row_of[ids] for ids in attended(given)]
        expected = collator([{"messages": row.chat} for row in found])
        assert torch.equal(given["attention_mask"], expected["attention_mask"])
        kept = given["labels"].shape[1]  # ms-swift computes no logits before the first label
        assert torch.equal(given["labels"], expected["labels"][:, -kept:])
        assert (expected["labels"][:, :-kept] == -100).all()
        for name in ("pixel_values", "tile_positions"):
            assert torch.equal(given[name], expected[name])
        seen |= {attended(given)[index] for index in range(len(found))}
    assert seen == set(row_of)


def test_sft_hands_over_what_our_collator_makes(full, rows, processor):
    assert [len(record["inputs"]["input_ids"]) for record in full.records] == [3] * 4
    check_batches(full, rows, processor)


def test_labels_are_answers_and_their_ends(full, rows, processor):
    """Told without our collator: of each row, all that is learned."""
    learned = [
        processor.decode(labels[labels != -100]) for record in full.records for labels in record["inputs"]["labels"]
    ]
    answers = {f" {row.given['solution']}<|endoftext|>" for row in rows[:-1]} | {" yes<|endoftext|> two<|endoftext|>"}
    assert set(learned) == answers


def test_loss_of_a_step_is_our_forwards(full, adapter, rows, processor, model):
    """Over a batch, and over two that are accumulated: the mean over all tokens that are learned."""
    batch = JinaVLMCollator(processor)([{"messages": row.chat} for row in rows])
    with torch.no_grad():
        expected = model(**batch).loss.item()
    for run in (full, adapter):
        assert run.log[0]["loss"] == pytest.approx(expected, abs=1e-5)
        assert run.log[1]["loss"] != pytest.approx(expected, abs=1e-2)


def test_full_checkpoint_loads(full, rows, processor, model):
    """With every part of it trained, and a processor that makes the same prompts."""
    trained = JinaVLMForConditionalGeneration.from_pretrained(full.checkpoint, dtype=torch.float32).state_dict()
    before = model.state_dict()
    assert trained.keys() == before.keys()
    assert {part_of(name) for name in trained if not torch.equal(trained[name], before[name])} == {
        part_of(name) for name in before
    }
    saved = JinaVLMProcessor.from_pretrained(full.checkpoint)
    for row in rows:
        batches = [JinaVLMCollator(each)([{"messages": row.chat}]) for each in (saved, processor)]
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[1])


def check_adapter(run, rows, processor) -> None:
    """Its tensors are all there, in every part; each was trained; and what the model says is another thing."""
    model = JinaVLMForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    batch = JinaVLMCollator(processor)([{"messages": row.chat} for row in rows])
    with torch.no_grad():
        before = model(**batch).loss
        model.load_adapter(str(run.checkpoint))
        after = model(**batch).loss
    assert (before - after).abs() > 1e-2
    saved = {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): tensor
        for name, tensor in load_file(run.checkpoint / "adapter_model.safetensors").items()
    }
    loaded = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert {part_of(name) for name in loaded} == {"encoder", "connector", "decoder"}
    assert all(tensor.any() for tensor in loaded.values())


def test_adapter_of_sft_loads(adapter, rows, processor):
    check_batches(adapter, rows, processor)
    check_adapter(adapter, rows, processor)


def test_grpo_sees_each_questions_images_and_their_log_probabilities(grpo, rows, processor, model):
    prompts = {}
    for row in rows:
        inputs = processor.apply_chat_template(
            row.chat[:-1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        prompts[tuple(inputs["input_ids"][0].tolist())] = inputs
    seen, differences, complete = set(), [], 0
    for record in grpo.records:
        given, tiles = record["inputs"], 0
        for index, ids in enumerate(attended(given)):
            (prompt,) = [prompt for prompt in prompts if ids[: len(prompt)] == prompt]
            own = {
                name: prompts[prompt][name] for name in ("pixel_values", "tile_positions") if name in prompts[prompt]
            }
            count = len(own.get("pixel_values", ()))
            for name, tensor in own.items():
                assert torch.equal(given[name][tiles : tiles + count], tensor)
            tiles += count
            answer = torch.tensor(ids[len(prompt) :])
            complete += ids[-1] == processor.tokenizer.eos_token_id
            seen.add(prompt)
            if record["step"] == 0:  # with the weights that it began with
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids]), **own).logits[0, len(prompt) - 1 : -1]
                alone = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
                found = record["log_probabilities"][index][record["mask"][index]]
                differences.append((found - alone).abs().max().item())
        assert tiles == len(given.get("pixel_values", ()))
    assert len(seen) == len(rows) and len(differences) >= 8
    assert max(differences) < 1e-5
    assert complete, "answers are learned with the token that ends them"


def test_adapter_of_grpo_loads(grpo, rows, processor):
    check_adapter(grpo, rows, processor)


# In this process


@pytest.fixture(scope="module")
def plugin():
    return import_external_file(str(PLUGIN))


@pytest.fixture
def template(plugin):
    def make(**settings):
        made = get_template(get_processor(str(CHECKPOINT)), **settings)
        made.set_mode("train")
        return made

    return make


def test_last_round_learns_the_last_answer(template, rows, processor):
    labels = torch.tensor(template(loss_scale="last_round").encode(rows[-1].given)["labels"])
    assert processor.decode(labels[labels != -100]) == " two<|endoftext|>"


def test_pixels_and_tiles_are_settings(template, rows, processor, monkeypatch):
    monkeypatch.setenv("MAX_TILES", "1")
    assert len(template().encode(rows[2].given)["pixel_values"]) == 2
    monkeypatch.delenv("MAX_TILES")
    fewer = processor.image_processor(
        [part["image"] for part in rows[2].chat[0]["content"][:1]], max_pixels=40_000, return_tensors="pt"
    )
    assert torch.equal(template(max_pixels=40_000).encode(rows[2].given)["pixel_values"], fewer["pixel_values"])


@pytest.mark.parametrize("settings", [{"loss_scale": "all"}, {"use_chat_template": False}], ids=str)
def test_other_settings_are_refused(template, settings):
    with pytest.raises(ValueError, match="takes --loss_scale default or last_round, and --use_chat_template true"):
        template(**settings)


def test_other_engines_are_refused(template):
    with pytest.raises(ValueError, match="not by vllm"):
        template().set_mode("vllm")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"videos": ["a.mp4"]}, "text and images; the row has videos"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}]},
            "`loss`",
        ),
    ],
    ids=["video", "loss"],
)
def test_what_would_be_ignored_is_refused(template, change, error):
    with pytest.raises(ValueError, match=error):
        template().encode(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], **change}
        )
