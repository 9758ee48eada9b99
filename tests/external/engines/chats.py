"""Chats that every engine must answer as torch does, and how they are asked."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from jina_vlm_tools.extras import EXTRAS
from jina_vlm_tools.inference.conversation import Conversation
from jina_vlm_tools.synthetic.questions import LANGUAGES, TASKS, evaluation_sample
from jina_vlm_tools.synthetic.shapes import draw_scene


KINDS = [(task, language) for task in TASKS for language in LANGUAGES]
NEW = 16


def drawn(seed: int, width: int = 378, height: int = 378) -> Image.Image:
    return draw_scene(evaluation_sample(seed, "count", "en").scene).resize((width, height))


def half_black(width: int, height: int) -> Image.Image:
    """Some of its tiles are black."""
    image = Image.new("RGB", (width, height), "white")
    image.paste("black", (0, 0, width // 2, height))
    return image


def ask_without_converters(extra: str, *arguments) -> dict:
    """What `jina-vlm ask --json` says where of an engine's packages only the one that runs it is installed."""
    script = (
        f"import sys\nfor name in {EXTRAS[extra][1:]}:\n    sys.modules[name] = None\n"
        f"from jina_vlm_tools.cli.main import main\nmain({['ask', *map(str, arguments), '--json']})"
    )
    return json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)


def refused(message: str, error: type[Exception] = ValueError):
    return pytest.raises(error, match=message)


def prepare(processor, *chats: list, **settings) -> dict:
    return processor.apply_chat_template(
        list(chats) if len(chats) > 1 else chats[0],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        processor_kwargs=settings,
    )


def user(*parts) -> dict:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def new_tokens(model, inputs, **options) -> list[list[int]]:
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def sampled(model, inputs) -> list[list[int]]:
    """Three answers to each, from the same seed each time, by options that reach all of `generate`'s processors."""
    torch.manual_seed(3)
    options = {"do_sample": True, "temperature": 4.0, "top_p": 0.99, "repetition_penalty": 1.1}
    return new_tokens(model, inputs, **options, num_return_sequences=3)


def converse(model, processor) -> tuple[Conversation, list[str]]:
    """Three turns, the last with another image, and what was answered."""
    conversation, images = Conversation(model, processor, NEW), [drawn(1), drawn(2)]
    questions = [("Describe the picture.", images[:1]), ("How many shapes are there?", []), ("And here?", images[1:])]
    return conversation, [conversation.answer(question, new).text for question, new in questions]


CHATS = {
    **{f"one image, {task}, {language}": evaluation_sample(i, task, language).question()
       for i, (task, language) in enumerate(KINDS)},
    "no image": [user("What is the capital of France?")],
    "no image, German": [user("Wie viele Formen sind zu sehen?")],
    "two images": [user(drawn(1), drawn(2, 700, 380), "How many shapes are there?")],
    "two images, French": [user(drawn(3), "et", drawn(4), "Combien de formes y a-t-il ?")],
    "tiles, some black": [user(half_black(900, 500), "Describe the picture.")],
    "turns": [user(drawn(5), "Describe the picture."), assistant("2 shapes"), user(drawn(6), "And here?")],
    "a system prompt": [{"role": "system", "content": "Be brief."}, user(drawn(7), "Describe the picture.")],
}  # fmt: skip
