"""What a model answers to a question of `eval_tiny`, and how far another one is from that."""

import torch

from jina_vlm_tools.synthetic.questions import normalize

from .eval_tiny import MAX_NEW_TOKENS


def prepare(processor, sample) -> dict:
    """Model inputs of a question."""
    return processor.apply_chat_template(
        sample.question(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@torch.inference_mode()
def answer(model, processor, sample, inputs: dict) -> tuple:
    """New tokens, whether the answer is right, and logits of its first token [vocabulary]."""
    output = model.generate(
        **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    is_right = normalize(processor.decode(new, skip_special_tokens=True)) == normalize(sample.turn.answer)
    return new.tolist(), is_right, output.logits[0][0]


def divergence(logits: torch.Tensor, other: torch.Tensor, suppressed: list[int]) -> float:
    """Of the second from the first, in nats, without tokens that are never an answer."""
    kept = torch.ones_like(logits, dtype=torch.bool)
    kept[suppressed] = False
    expected, given = (each[kept].double().log_softmax(0) for each in (logits, other))
    return float((expected.exp() * (expected - given)).sum())
