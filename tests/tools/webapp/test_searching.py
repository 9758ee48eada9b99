"""What the tab for searching does, without the page: files read, pages found and shown, answers from them."""

import threading

import pytest
import torch
from PIL import Image

from jina_vlm_tools.files import TINY, TINY_RETRIEVAL
from jina_vlm_tools.inference.conversation import Conversation
from jina_vlm_tools.inference.loading import load_on_device, load_processor_and_class


pytest.importorskip("peft")
pytest.importorskip("pypdfium2")
pytestmark = pytest.mark.skipif(not TINY_RETRIEVAL.is_dir(), reason="checkpoints/tiny-retrieval is missing")

from jina_vlm_tools.webapp.search_examples import IMAGES, PAGES, draw_examples, save_examples  # noqa: E402
from jina_vlm_tools.webapp.searching import Library, load_embedder  # noqa: E402
from jina_vlm_tools.webapp.showing_search import (  # noqa: E402
    show_chosen,
    show_hits,
    show_reading,
    show_source,
    show_words,
)


QUESTION = "Where is the pink star?"


@pytest.fixture(scope="module")
def loaded():
    processor, load_model = load_processor_and_class(str(TINY))
    return load_on_device(load_model, "cpu"), processor


@pytest.fixture(scope="module")
def embedder(loaded):
    return load_embedder(loaded[0], str(TINY_RETRIEVAL))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Four images, and a PDF of six pages."""
    return save_examples(tmp_path_factory.mktemp("files"))


@pytest.fixture
def new_library(embedder, loaded):
    return lambda: Library(embedder, *loaded)


@pytest.fixture
def library(new_library):
    return new_library()


@pytest.fixture(scope="module")
def full(embedder, loaded, files):
    """Of all files, read. What is found in it may change."""
    library = Library(embedder, *loaded)
    hold(library, files)
    read(library)
    return library


def hold(library, paths):
    library.hold([(str(path), path.name) for path in paths])


def read(library):
    for _ in library.read():
        pass


def answer(library):
    (*_, turn) = library.chat.stream(64, 0.0)
    return turn.text


def test_one_set_of_weights_serves_both(loaded, embedder):
    """The twin's own are the adapter's; the model has none of its parts."""
    model = loaded[0]
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    own = [name for name, parameter in embedder.model.named_parameters() if parameter.data_ptr() not in shared]
    assert own and all("lora_" in name for name in own)
    twins = {parameter.data_ptr() for parameter in embedder.model.parameters()}
    assert shared <= twins and not any("lora_" in name for name, _ in model.named_modules())
    assert {tensor.data_ptr() for tensor in model.buffers()} <= {
        tensor.data_ptr() for tensor in embedder.model.buffers()
    }


def test_the_chat_answers_as_before_while_an_adapter_is_on(loaded, embedder):
    image = draw_examples()[0]
    before = Conversation(*loaded, 64).answer("Describe the picture.", [image]).text
    plain = embedder.model.get_input_embeddings()  # of the twin
    ids = torch.tensor([[5, 6, 7]])
    with embedder.using("retrieval"), torch.no_grad():
        assert Conversation(*loaded, 64).answer("Describe the picture.", [image]).text == before
        adapted = embedder.model.model(inputs_embeds=plain(ids)).last_hidden_state
        assert not torch.equal(adapted, loaded[0].model(inputs_embeds=plain(ids)).last_hidden_state)


def test_pages_come_in_the_order_of_the_embedders_scores(full, embedder):
    full.find(QUESTION)
    images = draw_examples()[:IMAGES] + [full.files[-1].draw(page) for page in range(1, PAGES + 1)]
    names = [(f"drawing-{number}.png", 1) for number in range(1, IMAGES + 1)]
    names += [("drawings.pdf", page) for page in range(1, PAGES + 1)]
    asked = embedder.embed([QUESTION], role="query", kind="multi")
    scores = torch.cat([embedder.score(asked, embedder.embed([image], kind="multi"))[0] for image in images])
    order = scores.argsort(descending=True)[:5]
    assert [(hit.file.name, hit.page) for hit in full.found.hits] == [names[index] for index in order]
    means = scores[order] / len(asked.multi[0])
    assert [hit.score for hit in full.found.hits] == pytest.approx(means.tolist(), abs=1e-5)
    assert full.found.searched == 10 and full.found.words == QUESTION.split()


def test_heat_maps_are_the_embedders(full, embedder):
    full.find(QUESTION)
    hit = full.found.hits[0]
    expected = embedder.heat_map(QUESTION, hit.file.draw(hit.page))
    assert hit.heat_map.words == expected.words
    torch.testing.assert_close(hit.heat_map.rise, expected.rise, atol=1e-5, rtol=0)


def test_each_page_answers_as_the_chat_does(full, loaded):
    full.find(QUESTION)
    for number, hit in list(enumerate(full.found.hits))[:3]:
        full.choose(number)
        assert answer(full) == Conversation(*loaded, 64).answer(QUESTION, [hit.file.draw(hit.page)]).text


def test_another_choice_ends_the_answer_that_is_being_made(full):
    full.find(QUESTION)
    full.choose(0)
    first = full.chat
    full.choose(1)
    assert first.is_closed and full.chat is not first
    full.forget()
    assert full.found is None and full.chat is None


def test_bad_files_are_said_by_name_and_the_others_searched(library, files, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    (tmp_path / "<b>broken<_b>.pdf").write_bytes(b"%PDF-1.7 nothing")
    Image.new("RGB", (1005, 5)).save(tmp_path / "strip.png")
    hold(library, [tmp_path / "notes.png", files[0], tmp_path / "<b>broken<_b>.pdf", tmp_path / "strip.png"])
    read(library)
    shown = show_reading(library)
    assert library.searched == 1 and "Read <b>2 pages</b>" in shown and str(tmp_path) not in shown
    assert "<b>notes.png:</b> not an image in a format" in shown
    assert "<b>&lt;b&gt;broken&lt;_b&gt;.pdf:</b> cannot be read as a PDF" in shown
    assert "<b>strip.png:</b> " in shown and "200 times the shorter" in shown
    library.find(QUESTION)
    assert [hit.file.name for hit in library.found.hits] == [files[0].name]


def test_pages_above_the_limit_are_left_out_until_there_is_room(library, files):
    library.max_pages = 3
    hold(library, [files[0], files[-1], files[1]])
    read(library)
    shown = show_reading(library)
    assert library.searched == 3 and not library.is_stopped
    assert "<b>drawings.pdf:</b> pages 3 to 6 are left out, as 3 pages in all" in shown
    assert f"<b>{files[1].name}:</b> it is left out" in shown
    hold(library, [files[-1]])
    read(library)
    assert library.searched == 3 and "pages 4 to 6" in show_reading(library)


def test_reading_stops_and_goes_on(library, files):
    hold(library, files)
    for _ in library.read():
        if library.searched == 2:
            library.stop()
    assert library.searched == 2 and library.is_stopped and "Stopped <b>2 of 10 pages</b>" in show_reading(library)
    library.find(QUESTION)
    assert len(library.found.hits) == 2
    hold(library, files[:3])
    read(library)
    assert library.searched == 3 and not library.is_stopped and "Read <b>3 pages</b>" in show_reading(library)


def test_nobody_reads_twice_and_what_comes_meanwhile_is_read(library, files):
    hold(library, files[:1])
    first = library.read()
    next(first)
    hold(library, files[:2])
    assert list(library.read()) == []
    for _ in first:
        pass
    assert library.searched == 2 and not library.is_reading


def test_reading_ends_with_who_reads(library, files):
    hold(library, files[:2])
    reader = library.read()
    next(reader)
    reader.close()
    assert not library.is_reading and library.is_stopped


def test_a_failure_of_the_model_is_raised_and_reading_goes_on(library, files, embedder):
    hold(library, files[:1])

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = embedder.model.model.vision_model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            read(library)
    finally:
        handle.remove()
    assert library.is_stopped
    read(library)
    assert library.searched == 1


def test_users_see_their_own_files(new_library, files):
    """Also when they read at once."""
    mine, yours = new_library(), new_library()
    hold(mine, files[:2])
    hold(yours, files[2:4])
    threads = [threading.Thread(target=read, args=(library,)) for library in (mine, yours)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for library, own in ((mine, files[:2]), (yours, files[2:4])):
        library.find(QUESTION)
        assert {hit.file.path for hit in library.found.hits} == set(own)


def test_files_that_are_taken_away_are_found_no_more(library, files):
    hold(library, files[:2])
    read(library)
    library.find(QUESTION)
    hold(library, files[:1])
    assert library.found is None
    library.find(QUESTION)
    assert [hit.file.path for hit in library.found.hits] == files[:1]


def test_a_file_that_is_no_longer_kept_says_so(library, tmp_path):
    path = tmp_path / "gone.png"
    draw_examples()[0].save(path)
    hold(library, [path])
    read(library)
    path.unlink()
    library.find(QUESTION)
    (hit,) = library.found.hits
    assert hit.heat_map is None and hit.error == "gone.png is no longer kept here. Drop it again."
    assert hit.error in show_hits(library.found) and hit.error in show_chosen(library.found)
    with pytest.raises(ValueError, match="gone.png is no longer kept here"):
        library.choose(0)


@pytest.mark.parametrize(
    "question, message", [(" ", "Write a question."), ("a" * 1001, "1,000 letters, this one has 1,001")]
)
def test_questions_that_cannot_be_asked(full, question, message):
    with pytest.raises(ValueError, match=message):
        full.find(question)


def test_nothing_is_found_where_nothing_was_read(library, files):
    with pytest.raises(ValueError, match="Drop files first."):
        library.find(QUESTION)
    hold(library, files)
    with pytest.raises(ValueError, match="No page was read yet."):
        library.find(QUESTION)


@pytest.mark.parametrize("question", ["<|image|> & <b>bold</b>", "日本語 の 星", "the the"])
def test_any_question_is_shown_as_it_is(full, question):
    full.find(question)
    words = show_words(full.found)
    assert len(full.found.words) >= len(question.split()) and words.count("<button") == 1 + len(full.found.words)
    assert "<b>" not in words and "<|image|>" not in words and "<b>bold" not in show_source(full.found)


def test_what_is_shown_follows_the_word_and_the_page(full):
    full.find(QUESTION)
    everything, large = show_hits(full.found), show_chosen(full.found)
    assert everything.count("<li>") == 5 and everything.count('aria-pressed="true"') == 1
    full.found.word = full.found.words.index("star?")
    assert show_hits(full.found) != everything and show_chosen(full.found) != large
    assert "red where “star?” matches" in show_chosen(full.found)
    full.found.chosen, full.found.word = 1, None
    assert show_chosen(full.found) != large and full.found.hits[1].file.name in show_source(full.found)
