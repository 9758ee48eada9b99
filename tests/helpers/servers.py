"""Servers as their users start them, for tests: a free port, and a process until it answers."""

import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running(command: list[str], url: str, log: Path, seconds: float, **options) -> Iterator[subprocess.Popen]:
    """
    The process of a server, from when it answers until it is ended.

    Args:
        command (`list[str]`), options: For `subprocess.Popen`.
        url (`str`): What is asked until it answers.
        log (`Path`): The file that takes what the server writes.
        seconds (`float`): How long it may take to answer.

    Raises:
        RuntimeError: it ended before it answered; with the end of what it wrote.
        TimeoutError: it did not answer in time; the same.
    """
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options) as process,
    ):
        try:
            end = time.monotonic() + seconds
            while not _answers(url):
                if process.poll() is not None:
                    raise RuntimeError(f"The server ended with {process.returncode}:\n{log.read_text()[-4000:]}")
                if time.monotonic() > end:
                    raise TimeoutError(f"The server did not answer in {seconds} s:\n{log.read_text()[-4000:]}")
                time.sleep(0.2)
            yield process
        finally:
            process.terminate()
            process.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
