"""Times of several ways to do one thing, measured in turns."""

import gc
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch


def take_turns(cases: dict[str, Callable[[], object]], rounds: int = 5, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each case in each round, after one call of each that does not count. Every round begins with another
    case: a slow moment of the machine, or what a case leaves in the caches, does not always hit the same one."""
    names, seconds = list(cases), {name: [] for name in cases}
    for case in cases.values():
        case()
    gc.collect()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wait(device)
            start = time.perf_counter()
            cases[name]()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def wait(device: str) -> None:
    """Until a card has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def ratio(seconds: dict[str, list[float]], name: str, other: str) -> float:
    """How many times as long as the other this takes: the median over rounds in which the two ran side by side."""
    return statistics.median(one / two for one, two in zip(seconds[name], seconds[other], strict=True))


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in seconds.items()}


def together(seconds: dict[str, list[float]], names: Iterable[str]) -> list[float]:
    """What these take one after the other, in each round."""
    return [sum(times) for times in zip(*(seconds[name] for name in names), strict=True)]


def memory_bytes(kind: str) -> int:
    """Of this process (Linux). `VmRSS`: what it holds. `VmHWM`: its peak. `RssAnon`: what no file backs."""
    return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0]) * 1024


class Peak:
    """`with Peak() as peak:` leaves in `peak.bytes` how far anonymous memory rose above what it was before."""

    def __enter__(self) -> "Peak":
        self.before, self.bytes, self._done = memory_bytes("RssAnon"), 0, threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.bytes = max(self.bytes, memory_bytes("RssAnon") - self.before)

    def __exit__(self, *_) -> None:
        self.bytes = max(self.bytes, memory_bytes("RssAnon") - self.before)
        self._done.set()
        self._watcher.join()


def in_fresh_process(function: Callable, *arguments):
    """What a module's function returns when it is called in a process that has done nothing yet."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()
