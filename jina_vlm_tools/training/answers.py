"""Answers during evaluation: the last question of each chat, answered greedily by all processes together."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from jina_vlm_tools.synthetic.questions import normalize

from .stages import EvaluationSettings


@torch.inference_mode()
def answer(model, processor, conversations: list[list[dict]], max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch of conversations that end in a question."""
    inputs = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    ).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def ask_all(model, processor, samples: list[dict], evaluation: EvaluationSettings, accelerator: Accelerator) -> float:
    """The share of chats whose last answer has the expected words.

    Every process asks the same number of batches, since sharded models answer in step: some ask questions twice, which
    count once.
    """
    model.eval()
    total, size = len(samples), evaluation.batch_size * accelerator.num_processes
    rounds = -(-total // size)
    mine = [
        [(start + accelerator.process_index * evaluation.batch_size + k) % total for k in range(evaluation.batch_size)]
        for start in range(0, rounds * size, size)
    ]
    verdicts = []
    for indices in mine:
        chats = [samples[index]["messages"] for index in indices]
        expected = [next(part["text"] for part in chat[-1]["content"] if part["type"] == "text") for chat in chats]
        with accelerator.autocast():
            given = answer(model, processor, [chat[:-1] for chat in chats], evaluation.max_new_tokens)
        verdicts += [
            (index, normalize(text) == normalize(right))
            for index, text, right in zip(indices, given, expected, strict=True)
        ]
    right = dict(gather_object(verdicts))
    return sum(right.values()) / len(right)
