"""The page in a browser: what users do, and what they see."""

import io
import re
import struct
import time
import zlib

import pytest
from browsing import PHONE
from PIL import Image

from jina_vlm_tools.webapp.examples import EXAMPLES


CAPTION = "Describe the picture."
FIRST = (
    "5 shapes: at the top left a pink star, at the top a red star, in the centre an orange triangle, at the bottom "
    "left a pink star, at the bottom right a purple cross."
)


def encode(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it has this size, and holds one row of nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(width + 1)))
        + chunk(b"IEND", b"")
    )


# ---------------------------------------------------------------------------------------------------------------------
# Asking
# ---------------------------------------------------------------------------------------------------------------------


def test_upload_ask_answer(user, image_file, expected, loaded):
    user.upload(image_file())
    user.canvas.wait_for()
    user.ask(CAPTION)
    assert user.wait() == FIRST
    assert user.questions.all_inner_texts() == [CAPTION] and user.question.input_value() == ""
    (reference,) = expected(image_file(), CAPTION)
    tokens = loaded[1]._get_num_multimodal_tokens([(320, 360)])["num_image_tokens"][0]
    shown = user.table("#turn")
    assert shown["Image tokens"] == user.table("#tiling")["Image tokens"] == f"{tokens:,}"
    assert shown["Text tokens"] == str(reference.prompt_tokens - tokens)
    assert shown["Tokens of the answer"] == str(reference.tokens)
    assert re.fullmatch(r"[\d,]+ tokens/s", shown["Speed, after the first token"])
    for part in (
        "Making tiles and token ids",
        "Tower and connector",
        "Prompt, to the first token",
        "The other tokens",
        "In all, with showing it",
    ):
        assert re.fullmatch(r"[1-9]\d* ms|\d+\.\d\d s", shown[part]), part


def test_the_answer_is_seen_while_it_is_made(user, image_file, model_work):
    user.upload(image_file())
    user.canvas.wait_for()
    seen = []
    with model_work.slowly():
        user.ask(CAPTION)
        user.page.wait_for_function("document.querySelector('#chat .bot .prose')?.innerText.includes('star')")
        while not seen or not seen[-1].endswith("."):
            seen.append(user.answers.first.inner_text().strip())
            user.page.wait_for_timeout(50)
    partial = [text for text in dict.fromkeys(seen) if text != FIRST]
    assert len(partial) > 5 and all(FIRST.startswith(text) for text in partial)
    assert user.wait() == FIRST


def test_the_next_turn_knows_the_last_one(user, image_file, expected, model_work):
    questions = (CAPTION, "How many shapes are there?", "What colour is the triangle?")
    references = expected(image_file(), *questions)
    model_work.tower.clear()
    user.upload(image_file())
    user.canvas.wait_for()
    for number, (question, reference) in enumerate(zip(questions, references, strict=True), 1):
        user.ask(question)
        assert user.wait(number) == reference.text
        shown = user.table("#turn")
        assert shown["Text tokens"] == str(reference.prompt_tokens - int(shown["Image tokens"]))
        assert (shown["Tower and connector"] == "kept from before") == (number > 1)
    assert user.questions.all_inner_texts() == list(questions)
    assert len(model_work.tower) == 1


def test_special_tokens_and_markup_in_a_question_are_text(user, image_file):
    typed = "<|image|> <img src=x onerror=alert(1)> How many shapes are there?"
    user.upload(image_file())
    user.canvas.wait_for()
    user.ask(typed)
    assert user.wait()
    assert user.questions.first.inner_text().strip() == typed
    assert user.page.locator("#chat .prose img").count() == 0


def test_settings_are_used(user, image_file):
    user.page.locator("#settings button").first.click()
    user.page.locator("#max-new-tokens input[type=number]").fill("3")
    user.upload(image_file())
    user.canvas.wait_for()
    user.ask(CAPTION)
    answer, note = user.wait().split("\n\n")
    assert FIRST.startswith(answer) and answer != FIRST and note.startswith("Cut off")
    assert user.table("#turn")["Tokens of the answer"] == "3"
    user.page.locator("#max-new-tokens input[type=number]").fill("64")
    user.page.locator("#temperature input[type=number]").fill("2")
    answers = set()
    for number in (2, 3, 4):
        user.ask(CAPTION)
        answers.add(user.wait(number))
    assert answers != {FIRST}


def test_nothing_is_asked_without_an_image(user):
    user.ask(CAPTION)
    user.alert.wait_for()
    assert "Choose an image first." in user.alert.inner_text()
    assert user.questions.count() == 0 and user.question.input_value() == CAPTION


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_is_asked_by_a_click(user, number):
    right = (FIRST, "morado", "à droite", "5")[number]
    user.page.locator("#examples tbody tr").nth(number).click()
    assert user.wait() == right
    assert user.questions.all_inner_texts() == [EXAMPLES[number].question]
    assert user.page.locator("#image img").is_visible() and user.canvas.is_visible()


# ---------------------------------------------------------------------------------------------------------------------
# The view of tiles
# ---------------------------------------------------------------------------------------------------------------------


def test_tiles_are_shown_as_soon_as_an_image_is_there(user, image_file, loaded):
    user.upload(image_file(1))  # 1280 x 720
    user.canvas.wait_for()
    assert (user.canvas.get_attribute("width"), user.canvas.get_attribute("height")) == ("1176", "910")
    assert user.canvas.evaluate("image => image.complete && image.naturalWidth === 1176")
    tokens = loaded[1]._get_num_multimodal_tokens([(720, 1280)])["num_image_tokens"][0]
    shown = user.table("#tiling")
    assert (
        shown["Size"] == "1,280 × 720"
        and shown["Tiles"] == "3 × 4 and a thumbnail"
        and shown["Image tokens"] == f"{tokens:,}"
    )
    assert sum(int(shown[name].replace(",", "")) for name in shown if name.startswith("Tokens ")) == tokens
    assert user.page.locator("#tiling .kept figure").count() == 12
    user.page.locator("#tiling summary").click()
    assert user.page.locator("#tiling .kept figure").last.is_visible()


def test_fewer_tiles_begin_a_new_chat(user, image_file, loaded):
    user.upload(image_file(1))
    user.canvas.wait_for()
    user.ask(EXAMPLES[1].question)
    user.wait()
    user.page.locator("#settings button").first.click()
    field = user.page.locator("#max-tiles input[type=number]")
    field.fill("4")
    field.press("Tab")
    user.page.wait_for_function("document.querySelectorAll('#tiling .kept figure').length === 4")
    assert user.questions.count() == 0 and user.page.locator("#image img").is_visible()
    user.ask("How many shapes are there?")
    user.wait()
    tokens = loaded[1]._get_num_multimodal_tokens([(720, 1280)], max_tiles=4)["num_image_tokens"][0]
    assert user.table("#turn")["Image tokens"] == user.table("#tiling")["Image tokens"] == f"{tokens:,}"


def test_an_image_is_shown_as_the_model_sees_it(user, tmp_path):
    """Upright, also in a format that no browser shows."""
    image = Image.new("RGB", (400, 200), "white")
    exif = image.getexif()
    exif[274] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.tiff", exif=exif)
    user.upload(tmp_path / "turned.tiff")
    user.canvas.wait_for()
    assert user.table("#tiling")["Size"] == "200 × 400"
    user.page.wait_for_function("document.querySelector('#image img').naturalHeight === 400")


# ---------------------------------------------------------------------------------------------------------------------
# Stopping, clearing, leaving
# ---------------------------------------------------------------------------------------------------------------------


def test_stop(user, image_file, model_work):
    user.upload(image_file())
    user.canvas.wait_for()
    with model_work.slowly(0.3):
        user.ask(CAPTION)
        user.page.wait_for_function("document.querySelector('#chat .bot .prose')?.innerText.includes('star')")
        user.page.locator("#stop").click()
        answer, note = user.wait().split("\n\n")
        done = len(model_work.head)
        time.sleep(1)
        assert len(model_work.head) == done < 40
    assert note == "Stopped." and FIRST.startswith(answer) and answer != FIRST
    assert user.table("#turn")["Tokens of the answer"] == str(done)
    user.ask("What colour is the triangle?")
    assert user.wait(2) == "orange"


def test_clear(user, image_file, model_work):
    user.upload(image_file())
    user.canvas.wait_for()
    with model_work.slowly(0.3):
        user.ask(CAPTION)
        user.page.wait_for_function("document.querySelector('#chat .bot .prose')?.innerText.includes('star')")
        user.page.locator("#clear").click()
        user.page.locator("#tiling .quiet").wait_for()
        time.sleep(0.5)
        done = len(model_work.head)
        time.sleep(1)
        assert len(model_work.head) == done < 40
    assert (
        user.questions.count()
        == user.answers.count()
        == user.page.locator("#image img").count()
        == user.canvas.count()
        == 0
    )
    assert user.page.locator("#turn .quiet").is_visible() and user.page.locator("#send").is_visible()
    user.upload(image_file(3))
    user.canvas.wait_for()
    user.ask(EXAMPLES[3].question)
    assert user.wait() == "5"


def test_a_new_image_begins_a_new_chat(user, image_file, model_work):
    """Also while an answer about the last one is made, of which nothing is seen again."""
    user.upload(image_file())
    user.canvas.wait_for()
    with model_work.slowly(0.3):
        user.ask(CAPTION)
        user.page.wait_for_function("document.querySelector('#chat .bot .prose')?.innerText.includes('star')")
        user.page.locator("#examples tbody tr").nth(3).click()
        user.page.wait_for_function("document.querySelector('#chat .user .prose')?.innerText.includes('Wie viele')")
        assert user.wait() == "5"
        time.sleep(1)
    assert user.questions.all_inner_texts() == [EXAMPLES[3].question] and user.answers.count() == 1


def test_the_model_stops_for_users_who_leave(visit, image_file, model_work):
    user = visit()
    user.upload(image_file())
    user.canvas.wait_for()
    with model_work.slowly(0.5):
        user.ask(CAPTION)
        user.page.wait_for_function("document.querySelector('#chat .bot .prose')?.innerText.includes('star')")
        user.page.close()
        time.sleep(4)  # in which the server notices
        done = len(model_work.head)
        time.sleep(2)
        assert len(model_work.head) == done < 30


# ---------------------------------------------------------------------------------------------------------------------
# Failing
# ---------------------------------------------------------------------------------------------------------------------

IMAGE = encode(EXAMPLES[0].draw(), "PNG")
RUBBISH = {
    "text": (
        "notes.png",
        b"This is no image at all.\n" * 20,
        "notes.png: not an image in a format that Pillow can read",
    ),
    "nothing": ("empty.png", b"", "empty.png: not an image in a format that Pillow can read"),
    "half": ("half.jpg", encode(EXAMPLES[0].draw(), "JPEG")[:3000], "half.jpg: the image is damaged or incomplete"),
    "absurd size": (
        "bomb.png",
        png_of_size(60_000, 60_000),
        "bomb.png: more pixels than Pillow's limit against decompression bombs",
    ),
    "strip": (
        "strip.png",
        encode(Image.new("RGB", (1005, 5)), "PNG"),
        "its longer side may be at most 200 times the shorter. Crop it.",
    ),
    "a drawing": (
        "drawing.svg",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "drawing.svg: not an image in a format",
    ),
    "a long name": (f"{'n' * 60}.png", b"rubbish", f"{'n' * 60}.png: not an image in a format"),
    "markup": ("<img src=x onerror=alert(1)>.png", b"rubbish", ".png: not an image in a format"),
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_rubbish_is_refused_in_the_processors_words(user, image_file, kind):
    name, content, message = RUBBISH[kind]
    user.upload(image_file(3))
    user.canvas.wait_for()
    user.upload({"name": name, "mimeType": "image/png", "buffer": content})
    user.alert.wait_for()
    shown = user.alert.inner_text()
    assert shown.startswith("This image cannot be used.") and message in shown
    assert "gradio" not in shown and "/" not in shown.replace("http(s)", "")
    assert user.alert.locator("img").count() == 0
    assert user.page.locator("#image img").count() == user.canvas.count() == 0  # neither that one nor the last
    user.upload(image_file())
    user.canvas.wait_for()
    assert user.alert.count() == 0
    user.ask("How many shapes are there?")
    assert user.wait() == "5"


def test_a_failing_model_is_an_error_on_the_page(user, image_file, model_work):
    user.upload(image_file())
    user.canvas.wait_for()
    with model_work.slowly(), model_work.failing(RuntimeError("CUDA out of <memory>")):
        user.ask(CAPTION)
        user.alert.wait_for()
    assert user.alert.inner_text() == "This could not be answered. CUDA out of <memory>"
    assert user.page.locator("#send").is_visible() and not user.page.locator("#stop").is_visible()
    assert user.questions.count() == user.answers.count() == 0 and user.question.input_value() == CAPTION
    user.page.locator("#send").click()
    assert user.wait() == FIRST and user.alert.count() == 0


def test_too_long_a_question_is_an_error_on_the_page(user, image_file):
    user.upload(image_file())
    user.canvas.wait_for()
    user.ask("Describe " * 4000)
    user.alert.wait_for()
    assert "the model takes 4096" in user.alert.inner_text()


# ---------------------------------------------------------------------------------------------------------------------
# Many users, many screens
# ---------------------------------------------------------------------------------------------------------------------


def test_users_at_once_get_their_own_answers(visit, image_file, model_work, expected):
    """Three, of whom two are answered at once: the third one waits, and is answered."""
    users = [visit() for _ in range(3)]
    right = [expected(image_file(number), CAPTION)[0].text for number in (0, 2, 3)]
    assert len(set(right)) == 3
    for user, number in zip(users, (0, 2, 3), strict=True):
        user.upload(image_file(number))
        user.canvas.wait_for()
    with model_work.slowly():
        for user in users:
            user.ask(CAPTION)
        for user in users[:2]:
            user.answers.first.wait_for()
        assert all(user.page.locator("#stop").is_visible() for user in users)
        assert [user.wait() for user in users] == right


def test_a_phones_width_is_enough(visit, image_file):
    user = visit(**PHONE)
    assert not user.is_wider_than_the_screen()
    user.page.locator("#examples tbody tr").nth(1).tap()
    user.wait()
    user.page.locator("#tiling summary").tap()
    user.page.locator("#settings button").first.tap()
    assert not user.is_wider_than_the_screen()
    for part in (
        "#image",
        "#chat",
        "#question",
        "#send",
        "#clear",
        "#turn table",
        "#tiling .canvas img",
        "#tiling table",
        "#max-tiles",
    ):
        box = user.page.locator(part).first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["viewport"]["width"], part
    assert user.page.locator("#question").bounding_box()["width"] > 300
    user.upload({"name": f"{'long' * 40}.png", "mimeType": "image/png", "buffer": b"rubbish"})
    user.alert.wait_for()
    assert not user.is_wider_than_the_screen()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(visit, scheme):
    """Contrasts of at least 4.5 to 1, as WCAG 2 asks for."""
    user = visit(color_scheme=scheme)
    user.page.locator("#examples tbody tr").nth(0).click()
    user.wait()
    user.page.locator("#send").click()
    user.alert.wait_for()
    selectors = [
        "#head h1", "#head .quiet", ".note", "#examples td.textbox div", "#chat .user p", "#chat .bot p", "#send",
        "#clear", "#turn th", "#turn tfoot td:last-child", "#tiling figcaption span", "#tiling summary",
        "#alert .error", "#alert .error strong",
    ]  # fmt: skip
    contrasts = user.page.evaluate(CONTRASTS, selectors)
    background = user.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 150) == (scheme == "dark")
    assert {part: round(contrast, 2) for part, contrast in contrasts.items() if contrast < 4.5} == {}


CONTRASTS = """selectors => {
    const parse = color => {
        const context = new OffscreenCanvas(1, 1).getContext("2d");
        context.fillStyle = color;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data];
    };
    const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = element => {
        for (; element; element = element.parentElement) {
            const color = parse(getComputedStyle(element).backgroundColor);
            if (color[3] === 255) return color;
        }
        return [255, 255, 255, 255];
    };
    return Object.fromEntries(selectors.map(selector => {
        const element = document.querySelector(selector);
        const both = [luminance(parse(getComputedStyle(element).color)), luminance(ground(element))];
        const [a, b] = both.sort((x, y) => y - x);
        return [selector, (a + 0.05) / (b + 0.05)];
    }));
}"""
