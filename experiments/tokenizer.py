"""The small checkpoint's tokenizer: a byte-level BPE, trained on the texts that `page_questions` writes.

Its vocabulary is laid out like the released one, only shorter:

    256 bytes, merges, <|endoftext|>, |<EXTRA_TOKENS_0>| ...      the base, filled up to `BASE_SIZE`
    <im_start> <im_end> <im_patch> <im_col> <|image|> <im_slice>  the structural tokens

The text model has 128 rows more than the base. The base ends in a filler that no text uses: its row stands in for the
structural tokens where an engine samples without suppressing them.
"""

import random
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jina_vlm_tools.synthetic.page_questions import LANGUAGES, TASKS, ask_page
from jina_vlm_tools.synthetic.pages_data import task_page
from jina_vlm_tools.synthetic.shapes import ALL_PAIRS


BASE_SIZE = 2048
STRUCTURAL_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>", "<im_slice>")
END_OF_TEXT = "<|endoftext|>"
ADDITIONAL_ROWS = 128
MODEL_MAX_LENGTH = 4096


def texts(number: int, seed: int = 0) -> Iterator[str]:
    """So many turns as the chat template writes them, after an image and after other turns, of all tasks and
    languages, over all pairs of color and shape. Numbers and words on pages stay out: they are spelled."""
    rng = random.Random(seed)
    for _ in range(number):
        task, language = rng.choice(("shapes", *TASKS)), rng.choice(list(LANGUAGES))
        page = task_page(task, rng, ALL_PAIRS)
        turn = ask_page(page, task, language, rng)
        if turn:
            yield f"{turn.question} Assistant:" + (f" {turn.answer}" if task in ("shapes", "charts") else "")
            yield f" System: User: {turn.question}"


def train_tokenizer(number_of_texts: int = 20_000) -> PreTrainedTokenizerFast:
    """Learn merges until every word is one token, or the base is full."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_SIZE - 2,  # room for the end of text and one filler
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts(number_of_texts), trainer)
    backend.add_special_tokens([END_OF_TEXT])
    fillers = BASE_SIZE - backend.get_vocab_size()
    backend.add_special_tokens([f"|<EXTRA_TOKENS_{k}>|" for k in range(fillers)])
    backend.add_special_tokens(list(STRUCTURAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        add_bos_token=True,  # to prompts that engines encode without the processor
        padding_side="left",
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
