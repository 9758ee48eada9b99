"""What the tests of engines share: the small checkpoint's own answers, by transformers, and images to ask about.

The engines' answers are compared with these token by token, in float32 and greedily, so that nothing but a mistake
separates them: of the prompt, of the tiles, of the place that an embedding goes to, of what a cache held.
"""

import base64
import io
import os
from functools import lru_cache
from pathlib import Path

import pytest


# Before vLLM is imported. Its CPU workers otherwise take half of the machine's memory for their cache.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process has run torch's threads
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # by itself it wants a NUMA node for each process
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["no_proxy"] = "127.0.0.1"

CHECKPOINT = Path(__file__).parents[3] / "checkpoints" / "tiny"
MAX_TOKENS = 48


@lru_cache
def shapes(seed: int, width: int = 378, height: int = 378):
    """An image of a few colored shapes, which the small checkpoint was trained to tell about. Its size decides the
    number of its tiles."""
    from jina_vlm_tools.synthetic.questions import evaluation_sample
    from jina_vlm_tools.synthetic.shapes import draw_scene

    return draw_scene(evaluation_sample(seed, "count", "en").scene).resize((width, height))


def as_uri(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def user(*content) -> dict:
    """A user's turn as OpenAI's clients write it. Strings that are URLs or data URIs, and images, are shown."""

    def part(item):
        if not isinstance(item, str):
            item = as_uri(item)
        if item.startswith(("data:", "http:")):
            return {"type": "image_url", "image_url": {"url": item}}
        return {"type": "text", "text": item}

    return {"role": "user", "content": [part(item) for item in content]}


CHATS = {
    "text": [user("What colour is the star?")],
    "2 tiles": [user(shapes(1), "Describe the picture.")],
    "5 tiles": [user(shapes(2, 640, 480), "How many shapes are there?")],
    "13 tiles": [user(shapes(3, 1280, 720), "Describe the picture.")],
    "most tokens": [user(shapes(3, 300, 3300), "Describe the picture.")],
    "image last": [user("Was ist oben links?", shapes(4, 500, 300))],
    "two images": [user(shapes(5), "and", shapes(6, 640, 480), "Describe the picture.")],
    "the same twice": [user(shapes(7), shapes(7), "Describe the picture.")],
    "two of one size": [user(shapes(8), shapes(9), "Décris l'image.")],
    "one in another prompt": [user(shapes(1), "How many shapes are there?")],
    "one behind other text": [user("Look.", shapes(1), "Describe the picture.")],
    "turns": [
        {"role": "system", "content": "Answer briefly."},
        user(shapes(10), "How many shapes are there?"),
        {"role": "assistant", "content": "4"},
        user(shapes(11, 400, 900), "Describe the picture."),
    ],
}


class Reference:
    """What transformers makes of a chat: token ids of the prompt and of the greedy answer, without the token that ends
    it."""

    def __init__(self):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(CHECKPOINT, trust_remote_code=True)
        self.model = AutoModelForImageTextToText.from_pretrained(
            CHECKPOINT, trust_remote_code=True, dtype=torch.float32
        ).eval()
        self.end = self.model.generation_config.eos_token_id

    def __call__(self, chat: list[dict], max_tokens: int = MAX_TOKENS, **kwargs) -> tuple[list[int], list[int]]:
        inputs = self.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
        )
        ids = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)[0].tolist()
        length = inputs["input_ids"].shape[1]
        return ids[:length], self.without_end(ids[length:])

    def without_end(self, ids: list[int]) -> list[int]:
        return list(ids[:-1] if ids and ids[-1] == self.end else ids)

    def text(self, chat: list[dict], **kwargs) -> str:
        return self.processor.decode(self(chat, **kwargs)[1], skip_special_tokens=True)


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()
