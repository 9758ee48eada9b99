"""A text model that llama.cpp runs, by llama-cpp-python's bindings to its C functions: weights, and the sequences that
it reads and remembers. Nothing here knows images: a place holds a token or an embedding."""

import ctypes
import logging
import platform
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import torch


PLACES_AT_A_TIME = 128  # in one pass. With 512, llama.cpp's default, prompts take as long, and it 70 MB more
GROWTH = 256  # places; llama.cpp makes room in multiples of these
LOG_LEVEL_ERROR = 3

# By default the bindings write all that llama.cpp logs on stderr.
_log = logging.getLogger("llama-cpp-python")
if _log.level == logging.NOTSET:
    _log.setLevel(logging.ERROR)


@contextmanager
def collect_errors() -> Iterator[deque[str]]:
    """What llama.cpp says of errors meanwhile, in place of its log on stderr."""
    errors: deque[str] = deque(maxlen=4)

    @llama_cpp.llama_log_callback
    def note(level, text, _):
        if level == LOG_LEVEL_ERROR:
            errors.append(text.decode("utf-8", "replace").strip())

    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(note, ctypes.c_void_p())
    try:
        yield errors
    finally:
        llama_cpp.llama_log_set(before, data)


class TextModel:
    """
    The weights of a GGUF file, mapped into memory.

    Args:
        path: The file.
        use_gpu: Whether llama.cpp may put layers on a GPU; None if it was built for one.

    Raises:
        OSError: there is no such file, or llama.cpp cannot read it; the message has what it said.
    """

    def __init__(self, path: str | Path, use_gpu: bool | None = None):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is missing. Convert the checkpoint again: jina-vlm convert ... --to gguf")
        params = llama_cpp.llama_model_default_params()
        if use_gpu is False:
            params.n_gpu_layers = 0
        # Copies of the weights in another order. On x86 (AVX-512) they make prompts slower by half with Q4_K_M, take
        # 0.65 GB, make none of Q8_0 and Q5_K_M faster, and help Q4_0 alone. Arm's kernels are made for them.
        params.use_extra_bufts = platform.machine() not in ("x86_64", "AMD64")
        with collect_errors() as errors:
            llama_cpp.llama_backend_init()
            self.handle = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise OSError(f"llama.cpp cannot load {path}: {' '.join(errors) or 'it does not say why'}")
        # Contexts are made later, so that they are freed before.
        weakref.finalize(self, llama_cpp.llama_model_free, self.handle)
        vocabulary = llama_cpp.llama_model_get_vocab(self.handle)
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.width = llama_cpp.llama_model_n_embd(self.handle)
        self.bytes = llama_cpp.llama_model_size(self.handle)
        self.is_float32 = llama_cpp.llama_model_ftype(self.handle) == llama_cpp.LLAMA_FTYPE_ALL_F32


@dataclass(frozen=True)
class Place:
    """A token, or an embedding float32 [width], at a position of a sequence; `is_wanted`: its logits are asked for."""

    sequence: int
    position: int
    content: int | np.ndarray
    is_wanted: bool


class Sequences:
    """
    Several sequences that the model has read, as keys and values. Room is made as they grow.

    Args:
        count: How many.
    """

    def __init__(self, model: TextModel, count: int):
        self.model, self.count = model, count
        self.room, self.context, self._free = 0, None, None
        self._batches = [self._make_batch(width) for width in (0, model.width)]

    def _make_batch(self, width: int) -> llama_cpp.llama_batch:
        batch = llama_cpp.llama_batch_init(PLACES_AT_A_TIME, width, 1)
        weakref.finalize(self, llama_cpp.llama_batch_free, batch)
        return batch

    def reserve(self, length: int) -> None:
        """
        Make room for so many places in each sequence, and for some more.

        Raises:
            MemoryError: there is not as much memory.
        """
        if length <= self.room:
            return
        room = -(-(length + GROWTH) // GROWTH) * GROWTH
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = room * self.count, self.count
        params.n_batch = params.n_ubatch = PLACES_AT_A_TIME
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.kv_unified = False
        if self.model.is_float32:  # nothing is rounded: keys, values, and attention, which is fused in float16
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with collect_errors() as errors:
            context = llama_cpp.llama_init_from_model(self.model.handle, params)
            if not context:
                raise MemoryError(f"llama.cpp has no memory for {self.count} x {room} tokens: {' '.join(errors)}")
            free = weakref.finalize(self, llama_cpp.llama_free, context)
            try:
                if self.context:
                    self._copy_to(context)
            except BaseException:
                free()
                raise
        if self._free:
            self._free()
        self.context, self.room, self._free = context, room, free

    def _copy_to(self, context) -> None:
        for sequence in range(self.count):
            size = llama_cpp.llama_state_seq_get_size(self.context, sequence)
            held = (ctypes.c_uint8 * size)()
            llama_cpp.llama_state_seq_get_data(self.context, held, size, sequence)
            if not llama_cpp.llama_state_seq_set_data(context, held, size, sequence):
                raise RuntimeError("llama.cpp cannot move what it has read to a larger context.")

    def forget(self, sequence: int, start: int) -> None:
        """Forget the places of a sequence from a position on."""
        if self.context:
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.context), sequence, start, -1)

    def read(self, places: Sequence[Place]) -> np.ndarray:
        """
        Read places, those of each sequence in order and right behind what was read of it.

        Returns:
            Logits of those that are wanted, in their order: float32 [wanted, vocabulary].

        Raises:
            RuntimeError: llama.cpp fails.
        """
        self.reserve(1 + max(place.position for place in places))
        logits, start = [], 0
        while start < len(places):
            stop, is_token = start, isinstance(places[start].content, int)
            while (
                stop < len(places)
                and stop - start < PLACES_AT_A_TIME
                and isinstance(places[stop].content, int) == is_token
            ):
                stop += 1
            logits += self._read_alike(places[start:stop], self._batches[0 if is_token else 1])
            start = stop
        return np.stack(logits) if logits else np.empty((0, self.model.vocabulary_size), np.float32)

    def _read_alike(self, places: Sequence[Place], batch: llama_cpp.llama_batch) -> list[np.ndarray]:
        """Those of one batch: tokens alone, or embeddings alone."""
        batch.n_tokens = len(places)
        if not isinstance(places[0].content, int):
            given = np.ctypeslib.as_array(batch.embd, (PLACES_AT_A_TIME, self.model.width))
        for index, place in enumerate(places):
            if isinstance(place.content, int):
                batch.token[index] = place.content
            else:
                given[index] = place.content
            batch.pos[index], batch.logits[index] = place.position, place.is_wanted
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, place.sequence
        with collect_errors() as errors:
            code = llama_cpp.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama.cpp failed with {code}: {' '.join(errors)}")
        size = (self.model.vocabulary_size,)
        return [
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, index), size).copy()
            for index, place in enumerate(places)
            if place.is_wanted
        ]
