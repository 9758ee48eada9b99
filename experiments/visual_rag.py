"""Find a page, then answer from it: `python -m experiments.visual_rag checkpoints/tiny-retrieval`.

Drawn documents of five pages each. A search names one or more things that stand on one page alone ("a red star on the
left and the number 47"), and a question asks for something else on that page. It is answered from the right page, from
the one that was found, and from none. The pages asked about show shapes, the only ones that `checkpoints/tiny` answers
questions about; the others are of all kinds.

With `--pdfs FOLDER`: pages of real PDFs, searched by six words that stand in a row on one page alone, as its text
layer has them.
"""

import argparse
import random
import re
from pathlib import Path

import numpy as np
import pypdfium2
import torch
from PIL import Image

from jina_vlm_tools import markdown
from jina_vlm_tools.retrieval.embedder import JinaVLMEmbedder
from jina_vlm_tools.synthetic.page_questions import TASKS
from jina_vlm_tools.synthetic.pages import HELD_OUT_WORDS, Page, draw_page
from jina_vlm_tools.synthetic.pages_data import task_page
from jina_vlm_tools.synthetic.questions import EVALUATION_SEEDS, LANGUAGES, Turn, ask, normalize
from jina_vlm_tools.synthetic.questions import TASKS as QUESTIONS
from jina_vlm_tools.synthetic.searches import facts_of, query_about
from jina_vlm_tools.synthetic.shapes import HELD_OUT_PAIRS
from jina_vlm_tools.training.answers import answer

from .eval_pages import wilson
from .eval_retrieval import MEASURES, interval


PAGES = 5  # of a document
WORDS = 6  # of a search in a PDF
DPI = 144


def make_documents(number: int, rng: random.Random) -> list[list[Page]]:
    """Two pages of shapes, and three of other kinds, in any order."""
    documents = []
    for index in range(number):
        others = rng.sample([task for task in TASKS if task != "shapes"], PAGES - 2)
        words = HELD_OUT_WORDS[LANGUAGES[index % len(LANGUAGES)]]
        pages = [task_page(task, rng, HELD_OUT_PAIRS, words) for task in ("shapes", "shapes", *others)]
        rng.shuffle(pages)
        documents.append(pages)
    return documents


def make_questions(pages: list[Page], number: int, rng: random.Random) -> list[tuple[int, str, Turn]]:
    """A page's number, a search that finds it alone, and a question about it."""
    facts, made = [facts_of(page) for page in pages], []
    shapes = [index for index, page in enumerate(pages) if page.kind == "shapes"]
    while len(made) < number:
        index, language = rng.choice(shapes), LANGUAGES[len(made) % len(LANGUAGES)]
        query = query_about(pages[index], language, rng)
        turn = ask(pages[index].scene, QUESTIONS[len(made) // len(LANGUAGES) % len(QUESTIONS)], language, rng)
        if turn and sum(map(query.finds, facts)) == 1:
            made.append((index, query.text, turn))
    return made


def ask_all(embedder: JinaVLMEmbedder, turns: list[Turn], images: list[Image.Image | None], batch: int = 16) -> list:
    """Whether each answer's words are the expected ones; the adapter is off."""
    right = []
    for start in range(0, len(turns), batch):
        chats = []
        for turn, image in zip(turns[start : start + batch], images[start : start + batch], strict=True):
            shown = [] if image is None else [{"type": "image", "image": image}]
            chats.append([{"role": "user", "content": [*shown, {"type": "text", "text": turn.question}]}])
        given = answer(embedder.model, embedder.processor, chats, 12)
        right += [
            normalize(text) == normalize(turn.answer)
            for text, turn in zip(given, turns[start : start + batch], strict=True)
        ]
    return right


def answer_drawn(embedder: JinaVLMEmbedder, documents: int, questions: int, max_tiles: int | None) -> str:
    rng = random.Random(f"visual RAG {EVALUATION_SEEDS}")
    pages = [page for document in make_documents(documents, rng) for page in document]
    made = make_questions(pages, questions, rng)
    images = [draw_page(page) for page in pages]
    held = embedder.embed(images, kind="multi", max_tiles=max_tiles)
    sought = embedder.embed([query for _, query, _ in made], role="query", kind="multi", batch_size=32)
    found = sought.score(held).argmax(1).tolist()
    turns = [turn for *_, turn in made]
    rows = {
        "the right page": ask_all(embedder, turns, [images[index] for index, *_ in made]),
        "the page found": ask_all(embedder, turns, [images[index] for index in found]),
        "no page": ask_all(embedder, turns, [None] * len(turns)),
        "(the page found is the right one)": [place == index for place, (index, *_) in zip(found, made, strict=True)],
    }
    return markdown.table(
        ["Given", "Per cent right (interval)"],
        [[name, "{:.1f} ({:.1f} to {:.1f})".format(*_per_cent(right))] for name, right in rows.items()],
    ) + (
        f"\n\n{len(turns)} questions about {len(pages)} pages of {documents} documents; a page found by chance is the "
        f"right one in {100 / len(pages):.1f} % of the cases."
    )


def _per_cent(right: list[bool]) -> tuple[float, float, float]:
    low, high = wilson(sum(right), len(right))
    return 100 * sum(right) / len(right), 100 * low, 100 * high


def read_pdfs(folder: Path, number: int, rng: random.Random) -> tuple[list[Image.Image], list[list[str]]]:
    """So many pages, of which each has at least a hundred words, and their words."""
    images, texts = [], []
    files = sorted(folder.rglob("*.pdf"))
    rng.shuffle(files)
    for file in files:
        document = pypdfium2.PdfDocument(file)
        for place in rng.sample(range(len(document)), min(len(document), 10)):
            words = re.findall(r"\S+", document[place].get_textpage().get_text_range())
            if len(words) >= 100:
                images.append(document[place].render(scale=DPI / 72).to_pil())
                texts.append(words)
        document.close()
        if len(images) >= number:
            break
    return images[:number], texts[:number]


def search_pdfs(embedder: JinaVLMEmbedder, folder: Path, pages: int, queries: int, max_tiles: int | None) -> str:
    rng = random.Random("PDFs")
    images, texts = read_pdfs(folder, pages, rng)
    whole = [" ".join(words) for words in texts]
    asked, own = [], []
    for number in range(10 * queries):
        if len(asked) == queries:
            break
        index = number % len(texts)
        start = rng.randrange(len(texts[index]) - WORDS)
        said = " ".join(texts[index][start : start + WORDS])
        if sum(said in text for text in whole) == 1:
            asked.append(said)
            own.append(index)
    relevant = np.array([[said in text for text in whole] for said in asked])
    held = embedder.embed(images, kind="both", max_tiles=max_tiles)
    sought = embedder.embed(asked, role="query", kind="both", batch_size=32)
    both = {"late": sought.score(held).numpy(), "dense": (sought.dense @ held.dense.T).numpy()}
    both["chance"] = np.random.default_rng(0).random(relevant.shape)
    rows = [[name, *(interval(compute(scores, relevant)) for compute in MEASURES.values())] for name, scores in
            both.items()]  # fmt: skip
    return markdown.table(["Search", *MEASURES], rows) + f"\n\n{len(asked)} searches of {len(images)} pages."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a retrieval folder")
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--questions", type=int, default=480)
    parser.add_argument("--pdfs", type=Path, metavar="FOLDER")
    parser.add_argument("--pages", type=int, default=150, help="of PDFs (default: %(default)s)")
    parser.add_argument("--max-tiles", type=int, help="of a page (default: the checkpoint's)")
    args = parser.parse_args()
    embedder = JinaVLMEmbedder.from_pretrained(args.model, dtype=torch.float32)
    if args.pdfs:
        print(search_pdfs(embedder, args.pdfs, args.pages, 2 * args.pages, args.max_tiles))
    else:
        print(answer_drawn(embedder, args.documents, args.questions, args.max_tiles))


if __name__ == "__main__":
    main()
