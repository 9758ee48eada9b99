"""Answers for many users of one model: streamed, timed, and stopped when nobody waits. Knows nothing of the page."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from jina_vlm_tools.inference.conversation import Conversation, describe_images, find_ends


CLOSING_SECONDS = 5


@dataclass
class Turn:
    """An answer, as far as it has come. Times are in seconds, None where a part was not run or has not ended.

    `seconds_prepared`: tiles and token ids. `seconds_encoded`: tower and connector,
    once for an image. `seconds_first_token`: from the start of `generate` to its first token. `seconds_decoded`: from
    there to the last one. `seconds`: all of it."""

    text: str = ""
    image_tokens: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    seconds_prepared: float | None = None
    seconds_encoded: float | None = None
    seconds_first_token: float | None = None
    seconds_decoded: float | None = None
    seconds: float | None = None
    is_stopped: bool = False
    is_cut_off: bool = False

    @property
    def text_tokens(self) -> int:
        """Those of the prompt that do not stand for the image: questions, earlier answers, and what marks turns."""
        return self.prompt_tokens - self.image_tokens

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens behind the first."""
        return (self.tokens - 1) / self.seconds_decoded if self.seconds_decoded and self.tokens > 1 else None


class ImageChat(Conversation):
    """
    A conversation of one user about one image, which is encoded once.

    Between turns it keeps the image's embeddings ([tokens, hidden], 14 MB for 1,754 tokens of the 2.4B model in
    float32) and no cache of keys and values, which takes 28 times that: many users may have one each, and leave it
    lying.

    Args:
        model, processor: Of one checkpoint, shared with other chats.
        image (`PIL.Image.Image`): Shown with the first question.
        max_tiles (`int`): At most so many tiles of it beside the thumbnail.
    """

    def __init__(self, model, processor, image: Image.Image, max_tiles: int):
        super().__init__(model, processor, max_new_tokens=0, max_tiles=max_tiles)  # which each question brings
        self.image = image
        self.image_tokens = describe_images(processor, [image], **self.settings)[0]["tokens"]
        self.features = None
        self.is_closed = False
        self._stopped = threading.Event()
        self._lock, self._question, self._idle = threading.Lock(), None, threading.Event()
        self._idle.set()

    def begin(self, question: str) -> bool:
        """Takes the question that [`stream`] is to answer; from here on [`stop`] counts. False, and nothing, while
        there is another."""
        with self._lock:
            if not self._idle.is_set() or self._question is not None:
                return False
            self._question = question
            self._stopped.clear()
            return True

    def stop(self) -> None:
        """Ends the answer that is being made, with the token that is being made."""
        self._stopped.set()

    def close(self) -> None:
        """Ends the chat and the answer that is being made, and waits a while for the model to stop."""
        self.is_closed = True
        self.stop()
        self._idle.wait(CLOSING_SECONDS)

    def stream(self, max_new_tokens: int, temperature: float) -> Iterator[Turn]:
        """
        The answer to what [`begin`] took, or nothing. The same [`Turn`] comes again with each piece of text, and at
        the end. Closing the iterator stops the model.

        Args:
            max_new_tokens: Longest answer.
            temperature: 0 for the likeliest token each time, more for surprises.

        Raises:
            ValueError: the conversation would be longer than the model's positions.
            Exception: whatever the model failed with. The turn is forgotten, and the chat goes on from the one before.
        """
        with self._lock:
            question, self._question = self._question, None
            if question is None:
                return
            self._idle.clear()
        try:
            yield from self._stream(question, max_new_tokens, temperature)
        finally:
            self.stop()
            self._idle.set()

    def _stream(self, question: str, max_new_tokens: int, temperature: float) -> Iterator[Turn]:
        turn, start = Turn(image_tokens=self.image_tokens), time.perf_counter()
        inputs = self.prepare(question, [] if self.messages else [self.image]).to(self.model.device)
        turn.prompt_tokens, turn.seconds_prepared = inputs["input_ids"].shape[1], time.perf_counter() - start
        pixels = {name: inputs.pop(name) for name in ("pixel_values", "tile_positions") if name in inputs}
        yield turn
        if self.features is None and not self._stopped.is_set():
            encoding = time.perf_counter()
            self.features = self._encode(**pixels)
            turn.seconds_encoded = time.perf_counter() - encoding
            yield turn
        if self._stopped.is_set():
            turn.is_stopped, turn.seconds = True, time.perf_counter() - start
            yield turn
            return

        generation = _Generation(
            self.model,
            _TimedStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **inputs,
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=self.features)},
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=float(temperature) or None,  # a slider gives integers, which the library refuses
            stopping_criteria=StoppingCriteriaList([_Stopped(self._stopped)]),
        )
        generation.start()
        for piece in generation.streamer:
            turn.text = (turn.text + piece).lstrip()
            generation.time(turn)
            yield turn
        ids = generation.result().cpu()
        turn.text = turn.text.rstrip()
        generation.time(turn)
        turn.is_stopped = self._stopped.is_set()
        is_whole = find_ends(self.model, ids)[0, -1].item()
        turn.is_cut_off = not is_whole and not turn.is_stopped
        turn.seconds = time.perf_counter() - start
        self.remember(turn.text)
        yield turn

    def _encode(self, pixel_values: torch.Tensor, tile_positions: torch.Tensor) -> list[torch.Tensor]:
        """The image's embeddings, of its tiles alone what the text model reads."""
        with torch.no_grad():
            features = self.model.get_image_features(pixel_values, tile_positions).pooler_output
        if features[0].device.type != "cpu":
            torch.accelerator.synchronize(features[0].device)  # else the clock stops before the work does
        return features


class _TimedStreamer(TextIteratorStreamer):
    """Notes when tokens come: the first is the prompt."""

    def __init__(self, tokenizer, **kwargs):
        super().__init__(tokenizer, **kwargs)
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())
        super().put(value)


class _Stopped(StoppingCriteria):
    """Ends generation once an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class _Generation(threading.Thread):
    """`generate` in a thread of its own. However it ends, its streamer ends too."""

    def __init__(self, model, streamer: _TimedStreamer, **arguments):
        super().__init__(daemon=True)
        self.model, self.streamer, self.arguments = model, streamer, arguments
        self.began = self.output = self.error = None

    def run(self) -> None:
        self.began = time.perf_counter()
        try:
            self.output = self.model.generate(streamer=self.streamer, **self.arguments)
        except Exception as error:
            self.error = error
        finally:
            self.streamer.end()

    def result(self) -> torch.Tensor:
        """[1, length] token ids of prompt and answer; what it failed with is raised."""
        self.join()
        if self.error is not None:
            raise self.error
        return self.output

    def time(self, turn: Turn) -> None:
        times = self.streamer.times[1:]
        turn.tokens = len(times)
        if times:
            turn.seconds_first_token, turn.seconds_decoded = times[0] - self.began, times[-1] - times[0]
