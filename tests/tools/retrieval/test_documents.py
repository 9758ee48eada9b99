"""Pages of a folder: what is found, how large it is drawn, and what cannot be read."""

import hashlib

import numpy as np
import pypdfium2
import pytest
from conftest import make_image, refused
from PIL import Image

from jina_vlm_tools.retrieval.documents import Document, Page, draw, draw_all, find_files


BUDGET = 1_003_520


def pages(*colors: str, size=(300, 400)) -> list[Image.Image]:
    return [Image.new("RGB", size, color) for color in colors]


def save_pages(path, *colors: str, **settings) -> None:
    first, *others = pages(*colors)
    first.save(path, save_all=True, append_images=others, **settings)


def middle(image: Image.Image) -> tuple:
    return tuple(image.getpixel((image.width // 2, image.height // 2)))


def lock(path, password: str) -> None:
    """A PDF as encrypted ones say of themselves that they are; its keys fit no password."""
    content = path.read_bytes()
    entry = b"/Encrypt <</Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s>>> /ID [<00><00>]" % (b"00" * 32, b"11" * 32)
    at = content.rindex(b"trailer")
    path.write_bytes(content[:at] + content[at:].replace(b"<<", b"<< " + entry, 1))


def test_what_is_a_document(tmp_path):
    for name in ("b.PDF", "a.png", "sub/c.jpeg", "sub/.hidden.png", ".git/d.png", "e.txt", "f.eps", "g.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_files(tmp_path) == ["a.png", "b.PDF", "g.tif", "sub/c.jpeg"]
    with refused("none: no such folder", NotADirectoryError):
        find_files(tmp_path / "none")


def test_pages_of_a_pdf_and_of_a_tiff(tmp_path):
    for name in ("a.pdf", "a.tiff"):
        save_pages(tmp_path / name, "red", "white", "blue")
        with Document(tmp_path / name, BUDGET) as document:
            assert document.pages == 3
            colors = [middle(document.draw(number)) for number in (3, 1, 2)]
            expected = [(0, 0, 255), (255, 0, 0), (255, 255, 255)]
            assert np.abs(np.subtract(colors, expected)).max() < 4
            with refused("has 3 pages, and no page 4"):
                document.draw(4)


def test_an_animation_is_one_page(tmp_path):
    save_pages(tmp_path / "a.gif", "red", "blue")
    with Document(tmp_path / "a.gif", BUDGET) as document:
        assert document.pages == 1


def test_images_are_drawn_upright(tmp_path):
    image = Image.fromarray(make_image(30, 50))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    with Document(tmp_path / "a.png", BUDGET) as document:
        assert document.draw(1).size == (30, 50)


@pytest.mark.parametrize(
    ("points", "pixels"),
    [((595, 842), 1_003_520), ((100, 150), 200 * 300), ((3370, 4768), 1_003_520), ((2000, 20), 4000 * 40)],
    ids=["A4: the budget", "small: 144 dpi", "A0: the budget", "a strip: 144 dpi"],
)
def test_no_page_is_drawn_larger_than_useful(tmp_path, points, pixels):
    pdf = pypdfium2.PdfDocument.new()
    pdf.new_page(*points)
    pdf.save(tmp_path / "a.pdf")
    with Document(tmp_path / "a.pdf", BUDGET) as document:
        image = document.draw(1)
    assert pixels * 0.99 < image.width * image.height <= pixels * 1.01
    assert abs(image.width / image.height / (points[0] / points[1]) - 1) < 0.05


def test_what_cannot_be_read_is_told_and_the_rest_goes_on(tmp_path):
    save_pages(tmp_path / "good.pdf", "red", "blue")
    save_pages(tmp_path / "locked.pdf", "red")
    lock(tmp_path / "locked.pdf", "secret")
    (tmp_path / "broken.pdf").write_bytes((tmp_path / "good.pdf").read_bytes()[:300])
    (tmp_path / "empty.png").touch()
    Image.fromarray(make_image(80, 80)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-400])
    save_pages(tmp_path / "last.tiff", "red", "green")
    files = {name: name for name in find_files(tmp_path)}
    found = list(draw_all(tmp_path, files, {("good.pdf", 1)}, BUDGET))
    good = [str(each[0]) for each in found if isinstance(each, tuple)]
    assert good == ["good.pdf, page 2 of 2", "last.tiff, page 1 of 2", "last.tiff, page 2 of 2"]
    bad = {each.file: (each.page, each.error) for each in found if not isinstance(each, tuple)}
    assert bad.keys() == {"locked.pdf", "broken.pdf", "empty.png", "cut.png"}
    assert bad["locked.pdf"][0] == 0 and "it is encrypted, and needs a password" in bad["locked.pdf"][1]
    assert "broken.pdf cannot be read as a PDF" in bad["broken.pdf"][1] and bad["cut.png"][0] == 1


def test_a_page_is_drawn_again_as_long_as_its_file_is_the_same(tmp_path):
    save_pages(tmp_path / "a.pdf", "red", "blue")
    page = Page("a.pdf", 2, 2, hashlib.sha256((tmp_path / "a.pdf").read_bytes()).hexdigest())
    assert middle(draw(tmp_path, page, BUDGET))[2] > 250
    save_pages(tmp_path / "a.pdf", "red", "red")
    with refused("a.pdf has changed since it was indexed. `jina-vlm index`"):
        draw(tmp_path, page, BUDGET)
    (tmp_path / "a.pdf").unlink()
    with refused("a.pdf is gone", FileNotFoundError):
        draw(tmp_path, page, BUDGET)
