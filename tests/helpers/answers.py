"""What a model answers by the library alone, for comparing with what answers in another way."""

import os


def prepare(processor, parts: list, **settings):
    """A question's inputs. Strings among its parts are text; paths and all else are images."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": os.fspath(part) if isinstance(part, os.PathLike) else part}
        for part in parts
    ]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=settings,
    )


def answer_greedily(model, processor, inputs, max_new_tokens: int) -> str:
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
