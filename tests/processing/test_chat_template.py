"""`chat_template.jinja` writes the release's text. What that is was transcribed from two independent ports: each turn
is a space, the role, a colon and a space, then its parts; a space follows each text, and the generation prompt brings
none."""

import pytest


def release(messages: list[dict]) -> str:
    """The release's text, of turns that alternate."""
    turns = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = ["<|image|>" if part["type"] == "image" else f"{part['text']} " for part in parts]
        turns.append(f" {message['role'].capitalize()}: {''.join(texts)}")
    return "".join(turns) + "Assistant:"


IMAGE = {"type": "image"}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def assistant(*parts) -> dict:
    return {"role": "assistant", "content": list(parts)}


CHATS = {
    "one turn": [user(IMAGE, text("Describe this picture"))],
    "text alone": [user(text("What is the capital of France?"))],
    "string": [{"role": "user", "content": "Hello"}],
    "text before an image": [user(text("Compare"), IMAGE)],
    "between images": [user(IMAGE, text("and"), IMAGE, text("Which is older?"))],
    "two texts": [user(text("One."), text("Two."))],
    "two turns": [user(IMAGE, text("What?")), assistant(text("A cat.")), user(text("Where?"))],
    "an image later": [user(text("Hi")), assistant(text("Hello.")), user(IMAGE), {**assistant(), "content": "A dog."}]
    + [user(text("Sure?"))],
    "an image in an answer": [user(text("Draw.")), assistant(text("Here:"), IMAGE), user(text("Thanks."))],
    "an image for an answer": [user(text("Draw.")), assistant(IMAGE), user(text("Again, like"), IMAGE)],
    "lines": [user(text("a\n")), assistant(text(" b\n\n")), user(text("c"))],
}
WRITTEN = {
    "one turn": " User: <|image|>Describe this picture Assistant:",
    "text before an image": " User: Compare <|image|>Assistant:",
    "two turns": " User: <|image|>What?  Assistant: A cat.  User: Where? Assistant:",
}


@pytest.mark.parametrize("name", CHATS)
def test_text_is_the_releases(processor, name):
    written = processor.apply_chat_template(CHATS[name], add_generation_prompt=True)
    assert written == "<|endoftext|>" + release(CHATS[name])
    assert name not in WRITTEN or written == "<|endoftext|>" + WRITTEN[name]


def test_a_finished_chat_is_what_was_asked_and_answered(processor):
    """For training: the last answer follows its prompt as a generated one would, and ends as it should."""
    for name, chat in CHATS.items():
        asked = processor.apply_chat_template(chat, add_generation_prompt=True)
        finished = processor.apply_chat_template([*chat, assistant(text("Yes."))])
        assert finished == f"{asked} Yes.<|endoftext|>", name


def test_system_is_a_turn_of_its_own(processor):
    chat = [{"role": "system", "content": "Be brief."}, user(IMAGE, text("What?"))]
    expected = "<|endoftext|> System: Be brief.  User: <|image|>What? Assistant:"
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == expected


def test_an_image_ends_an_answer(processor):
    """As a text does, but for the space that follows texts alone."""
    chat = [user(text("Draw.")), assistant(text("Here:"), IMAGE)]
    expected = "<|endoftext|> User: Draw. Assistant: Here: <|image|><|endoftext|>"
    assert processor.apply_chat_template(chat) == expected


@pytest.mark.parametrize("given", ["tools", "documents", "tool_calls"])
def test_what_a_template_has_no_place_for_is_refused(processor, given):
    function = {"type": "function", "function": {"name": "look", "arguments": {}}}
    chat, more = [user(text("Hi"))], {given: [function]}
    if given == "tool_calls":
        chat, more = [*chat, {"role": "assistant", "content": "", **more}, user(text("And?"))], {}
    for conversation in (chat, [chat, chat]):
        with pytest.raises(ValueError, match=f"Got `{given}`, which the chat template does not use"):
            processor.apply_chat_template(conversation, **more)
    own = "{{ messages | map(attribute='tool_calls') | list }}{{ tools }}{{ documents }}"
    assert "look" in processor.apply_chat_template(chat, chat_template=own, **more)
    assert processor.apply_chat_template([user(text("Hi"))], **dict.fromkeys(more))
