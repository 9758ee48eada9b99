"""What is being done, for people who wait."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class Progress:
    """Says what is being done, and keeps the `seconds` of each step by its name.

    Args:
        stream: Where to; stderr if left out, and there only if it is a terminal.
    """

    def __init__(self, stream: TextIO | None = None):
        self.stream = sys.stderr if stream is None else stream
        self.is_shown = stream is not None or self.stream.isatty()
        self.seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        if self.is_shown:
            print(text, file=self.stream, flush=True)

    @contextmanager
    def step(self, name: str, what: str) -> Iterator[None]:
        self.say(f"{what} ...")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.say(f"  {self.seconds[name]:.1f} s")
