"""What the page says in plain text, and reads."""

from .answering import Turn


STOPPED, CUT_OFF, EMPTY = "*Stopped.*", "*Cut off: allow more tokens in the settings.*", "*The model said nothing.*"


def with_notes(turn: Turn, cut_off: str = CUT_OFF) -> str:
    """The answer as far as it has come, and how it ended where that is not plain to see. `cut_off` is said of one that
    was not whole."""
    is_empty = turn.seconds is not None and not turn.text and not turn.is_stopped
    notes = [
        note for note, is_so in ((STOPPED, turn.is_stopped), (cut_off, turn.is_cut_off), (EMPTY, is_empty)) if is_so
    ]
    return "\n\n".join([turn.text, *notes] if turn.text else notes)


def text_of(message: dict) -> str:
    """A chat's message, as the chatbot gives it back."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def without_folder(message: str, path: str, name: str) -> str:
    """The processor's message about an upload, with the name that the user knows, and nothing of the server's folders.
    It cuts long paths short."""
    return message.replace(path, name).replace(f"{path[:80]}...", name)
