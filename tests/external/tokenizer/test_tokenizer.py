"""The release's tokenizer at its true size: Qwen3's, filled up, with the structural tokens behind. Figures that others
measured on the release hold."""

import numpy as np
import pytest
from PIL import Image

from benchmarks.tokenizing import prompt, released_processor


# The languages of the release's card, each with a sentence
SENTENCES = {
    "en": "What is in the picture?",
    "zh": "图片里有什么？",
    "ar": "ماذا يوجد في الصورة؟",
    "pt": "O que há na imagem?",
    "ru": "Что на картинке?",
    "tr": "Resimde ne var?",
    "de": "Was ist auf dem Bild?",
    "es": "¿Qué hay en la imagen?",
    "fr": "Qu'y a-t-il sur l'image ?",
    "it": "Cosa c'è nell'immagine?",
    "ja": "写真には何がありますか？",
    "ko": "사진에 무엇이 있나요?",
    "vi": "Có gì trong bức ảnh?",
    "th": "ในภาพมีอะไรบ้าง",
    "id": "Apa yang ada di gambar?",
    "hi": "चित्र में क्या है?",
    "bn": "ছবিতে কী আছে?",
    "nl": "Wat staat er op de foto?",
    "pl": "Co jest na zdjęciu?",
    "sv": "Vad finns på bilden?",
    "fi": "Mitä kuvassa on?",
    "da": "Hvad er der på billedet?",
    "no": "Hva er på bildet?",
    "cs": "Co je na obrázku?",
    "el": "Τι υπάρχει στην εικόνα;",
    "he": "מה יש בתמונה?",
    "uk": "Що на зображенні?",
    "ro": "Ce este în imagine?",
    "hu": "Mi van a képen?",
}
TYPED = ["<|image|>", "<im_patch>", "<im_start>", "<im_end>", "<im_col>", "<im_slice>", "<|endoftext|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def processor():
    return released_processor()


def ask(processor, text: str, *sizes: tuple[int, int]) -> list[int]:
    """Token ids of a question about images of these sizes, (width, height)."""
    images = [{"type": "image", "image": Image.fromarray(np.zeros((h, w, 3), np.uint8))} for w, h in sizes]
    chat = [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
    made = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    return np.ravel(made["input_ids"]).tolist()


def test_ids_are_the_releases(processor):
    tokenizer = processor.tokenizer
    expected = {
        "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<im_start>": 151936,
        "<im_end>": 151937, "<im_patch>": 151938, "<im_col>": 151939, "<|image|>": 151940, "<im_slice>": 151941,
    }  # fmt: skip
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in expected} == expected
    assert tokenizer(" User", add_special_tokens=False)["input_ids"] == [2657]
    assert len(tokenizer) == 151942


@pytest.mark.parametrize(
    ("text", "size", "of_image", "in_all"),
    [("Describe the image.", (640, 480), 814, 824), ("Describe this picture", (1200, 910), 1744, 1753)],
)
def test_prompts_are_as_long_as_others_measured(processor, text, size, of_image, in_all):
    ids = ask(processor, text, size)
    image = [
        processor.tokenizer.convert_tokens_to_ids(t) for t in ("<im_start>", "<im_end>", "<im_patch>", "<im_col>")
    ]
    assert (sum(token in image for token in ids), len(ids)) == (of_image, in_all)


def test_the_benchmark_times_that_prompt(processor):
    written = processor.tokenizer(prompt(processor), add_special_tokens=False)["input_ids"]
    assert written == ask(processor, "Describe this picture", (1200, 910))


@pytest.mark.parametrize("language", SENTENCES)
def test_typed_control_tokens_stay_text(processor, language):
    """In front of a sentence, within it and behind it, where other scripts meet them."""
    sentence, tokenizer = SENTENCES[language], processor.tokenizer
    middle = len(sentence) // 2
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    harmless = [token for token in ask(processor, sentence, (20, 20)) if token in special]
    for token in TYPED:
        for text in (token + sentence, sentence[:middle] + token + sentence[middle:], sentence + token):
            ids = ask(processor, text, (20, 20))
            assert [token_id for token_id in ids if token_id in special] == harmless
            assert text in tokenizer.decode(ids)
