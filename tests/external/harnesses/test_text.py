"""lm-eval's text path, `hf`, on the bundle: its log-likelihoods and answers are our own.

Rows have the schemas of MMLU, ARC, HellaSwag and GSM8K; lm-eval's own task files read them. What they ask about are
shapes: the small checkpoint has few other words.
"""

import random
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from conftest import CHECKPOINT
from datasets import ClassLabel, Features, List, Value
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
STRING = Value("string")
COLORS = ("red", "orange", "green", "blue", "pink", "black")


def mmlu(rng) -> dict:
    return {
        "question": f"What colour is the {rng.choice(['star', 'ring'])}?",
        "subject": "shapes",
        "choices": rng.sample(COLORS, 4),
        "answer": rng.randrange(4),
    }


def arc(rng) -> dict:
    return {
        "id": str(rng.random()),
        "question": f"How many {rng.choice(['stars', 'rings'])} are there?",
        "choices": {"text": ["1", "two shapes", "3 red stars"], "label": ["A", "B", "C"]},
        "answerKey": rng.choice("ABC"),
    }


def hellaswag(rng) -> dict:
    color = rng.choice(COLORS)
    return {
        "activity_label": "Shapes",
        "ctx_a": f"There is a {color} star at the top.",
        "ctx_b": "it",
        "endings": ["is red.", "is at the bottom.", "is a blue ring.", f"is {color}."],
        "label": str(rng.randrange(4)),
    }


def gsm8k(rng) -> dict:
    number = rng.randint(2, 9)
    return {
        "question": f"There are {number} stars and {number} rings. How many shapes?",
        "answer": f"{number} + {number}\n#### {2 * number}",
    }


SCHEMAS = {
    "mmlu": (
        mmlu,
        LM_EVAL_TASKS / "mmlu" / "default" / "mmlu_abstract_algebra.yaml",
        Features(
            {"question": STRING, "subject": STRING, "choices": List(STRING), "answer": ClassLabel(names=list("ABCD"))}
        ),
        ("test", "dev"),
    ),
    "arc": (
        arc,
        LM_EVAL_TASKS / "arc" / "arc_challenge.yaml",
        Features(
            {
                "id": STRING,
                "question": STRING,
                "choices": {"text": List(STRING), "label": List(STRING)},
                "answerKey": STRING,
            }
        ),
        ("train", "validation", "test"),
    ),
    "hellaswag": (
        hellaswag,
        LM_EVAL_TASKS / "hellaswag" / "hellaswag.yaml",
        Features({**dict.fromkeys(("activity_label", "ctx_a", "ctx_b", "label"), STRING), "endings": List(STRING)}),
        ("train", "validation"),
    ),
    "gsm8k": (
        gsm8k,
        LM_EVAL_TASKS / "gsm8k" / "gsm8k.yaml",
        Features({"question": STRING, "answer": STRING}),
        ("train", "test"),
    ),
}
ROWS = 12
TOKENS = 24


def run(harness, schema: str, batch_size: int = 8, changes: dict | None = None, **model_args) -> dict:
    make, source, features, splits = SCHEMAS[schema]
    rng = random.Random(schema)
    rows = {split: [make(rng) for _ in range(ROWS)] for split in splits}
    task = harness.copy_task(source, features, rows, **(changes or {}))
    return harness(task, model="hf", batch_size=batch_size, num_fewshot=2, **model_args)


@torch.inference_mode()
def own_loglikelihood(model, processor, context: str, continuation: str) -> tuple[float, bool]:
    """Of the continuation's tokens, and whether greedy decoding would give them: one forward pass over what the
    processor makes of both."""
    prompt = processor(text=context)["input_ids"][0]
    ids = torch.tensor(processor(text=context + continuation)["input_ids"])
    assert ids[0, : len(prompt)].tolist() == prompt
    logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = ids[0, len(prompt) :]
    return logprobs.gather(1, expected[:, None]).sum().item(), bool((logprobs.argmax(-1) == expected).all())


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("schema", ["mmlu", "arc", "hellaswag"])
def test_loglikelihoods(harness, model, processor, schema, batch_size):
    results = run(harness, schema, batch_size)
    right = 0
    values = set()
    for sample in results["samples"]:
        own = [own_loglikelihood(model, processor, *request) for request in sample["arguments"]]
        given = [(float(value), greedy) for value, greedy in sample["filtered_resps"]]
        assert len(given) >= 3 and given == [(pytest.approx(value, abs=1e-3), greedy) for value, greedy in own]
        best = max(range(len(own)), key=lambda index: own[index][0])
        right += best == sample["target"]
        values.update(round(value, 2) for value, _ in own)
    assert len(values) > ROWS, "log-likelihoods that are all the same show nothing"
    assert len(results["samples"]) == ROWS
    assert results["scores"]["acc,none"] == pytest.approx(right / ROWS)


def test_answers(harness, model, processor):
    """GSM8K's answers are generated, from plain text that `<|endoftext|>` opens, up to the next "Question:"."""
    settings = {"until": ["Question:"], "do_sample": False, "temperature": 0.0, "max_gen_toks": TOKENS}
    results = run(harness, "gsm8k", changes={"generation_kwargs": settings})
    assert len(results["samples"]) == 2 * ROWS, "each row under two filters"
    for sample in results["samples"]:
        [(context, _)] = sample["arguments"]
        ids = torch.tensor(processor(text=context)["input_ids"])
        answer = model.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
        text = processor.decode(answer, skip_special_tokens=True)
        assert sample["resps"][0][0] == text.split("Question:")[0] != ""
    assert {"exact_match,strict-match", "exact_match,flexible-extract"} <= results["scores"].keys()


def test_opening_token(harness, model, processor):
    """The tokenizer adds the token that opened every text in training. With `add_bos_token=True` it is there once all
    the same, with `add_bos_token=False` it is left out."""
    found = {}
    for asked in ({}, {"add_bos_token": True}, {"add_bos_token": False}):
        sample = run(harness, "arc", **asked)["samples"][0]
        found[asked.get("add_bos_token")] = [float(value) for value, _ in sample["filtered_resps"]]
    own = pytest.approx(
        [own_loglikelihood(model, processor, *request)[0] for request in sample["arguments"]], abs=1e-2
    )
    assert found[None] == own and found[True] == own and found[False] != own


def load(**model_args) -> HFLM:
    return HFLM(str(CHECKPOINT), trust_remote_code=True, dtype="float32", device="cpu", **model_args)


def test_opened_once(processor):
    """Chats by their template, other texts by the tokenizer."""
    harness_model = load()
    chat = harness_model.apply_chat_template([{"role": "user", "content": "the star"}])
    assert chat.startswith("<|endoftext|>")
    for text in ("the star", chat):
        expected = processor(text=text)["input_ids"]
        assert (
            harness_model.tok_encode(text) == expected[0]
            and harness_model.tok_batch_encode([text])[0].tolist() == expected
        )


def test_whole_texts(model, processor):
    """For these the harness puts `<|endoftext|>` in front by itself, whatever the tokenizer adds, which it must be
    asked not to."""
    request = Instance("loglikelihood_rolling", {}, ("the star is red",), 0)
    own, _ = own_loglikelihood(model, processor, "", "the star is red")
    assert load(add_bos_token=False).loglikelihood_rolling([request], disable_tqdm=True) == [
        pytest.approx(own, abs=1e-3)
    ]
