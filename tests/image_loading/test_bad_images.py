"""What is no image, or a damaged or missing one, is refused by an error that says what was given and what was
expected. Files of every format that are cut or mutated, and servers that do harm, are in `test_hostile_files.py`."""

import io
import resource

import pytest
from conftest import refused
from PIL import Image


def encoded(make_image, file_format: str, **kwargs) -> bytes:
    file = io.BytesIO()
    Image.fromarray(make_image(200, 200)).save(file, file_format, **kwargs)
    return file.getvalue()


@pytest.mark.parametrize(
    "thing", [object(), 7, {"a": 1}, b"bytes", None, [None], [object()]], ids=lambda thing: type(thing).__name__
)
def test_no_image(tiler, processor, thing):
    name = type(thing[0] if isinstance(thing, list) else thing).__name__
    with refused(f"Expected an image .*PIL image.*got {name}", TypeError):
        tiler(thing)
    if thing is not None:  # the processor takes it for no images
        with refused(f"Expected an image .*got {name}", TypeError):
            processor(images=thing, text="<|image|>")


@pytest.mark.parametrize(
    "content", [b"just text", b"<html><body>404</body></html>", b""], ids=["text", "html", "empty"]
)
def test_file_that_is_no_image(tiler, tmp_path, content):
    path = tmp_path / "page.png"
    path.write_bytes(content)
    with refused("page.png: not an image in a format that Pillow can read"):
        tiler(path)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated(tiler, make_image, tmp_path, file_format):
    data = encoded(make_image, file_format)
    path = tmp_path / f"half.{file_format.lower()}"
    path.write_bytes(data[: len(data) // 2])
    with refused(f"half.{file_format.lower()}.*damaged or incomplete"):
        tiler(path)
    if file_format != "WEBP":  # which Pillow does not even open
        with refused("damaged or incomplete"):
            tiler(Image.open(io.BytesIO(path.read_bytes())))


def test_corrupt(tiler, make_image, tmp_path):
    data = bytearray(encoded(make_image, "PNG"))
    start = data.index(b"IDAT") + 20
    data[start : start + 200] = bytes(200)
    (tmp_path / "corrupt.png").write_bytes(data)
    with refused("corrupt.png.*damaged or incomplete"):
        tiler(tmp_path / "corrupt.png")
    header = bytearray(encoded(make_image, "JPEG"))
    header[20:160] = b"\xff" * 140  # its tables
    (tmp_path / "corrupt.jpg").write_bytes(header)
    with refused("corrupt.jpg.*(damaged or incomplete|not an image)"):
        tiler(tmp_path / "corrupt.jpg")


def test_decompression_bomb(tiler, make_image, tmp_path, web, monkeypatch):
    folder, url = web
    (folder / "bomb.png").write_bytes(encoded(make_image, "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for image in (folder / "bomb.png", f"{url}/bomb.png"):
        with refused("bomb.png: more pixels than Pillow's limit .*MAX_IMAGE_PIXELS"):
            tiler(image)


def test_missing(tiler, web):
    folder, url = web
    with refused("No such image: '/nowhere/cat.png'. Expected a file, an http", FileNotFoundError):
        tiler("/nowhere/cat.png")
    with refused("nowhere/cat", (ValueError, FileNotFoundError)):
        tiler("/nowhere/cat")
    with refused(f"Could not download the image at '{url}/none.png'.*404"):
        tiler(f"{url}/none.png")
    with refused("Could not download the image at 'http://127.0.0.1:9/x.png'"):
        tiler("http://127.0.0.1:9/x.png")
    (folder / "page.html").write_text("<html>")
    with refused("page.html: not an image"):
        tiler(f"{url}/page.html")
    for source in (folder, str(folder)):
        with refused(f"'{folder}' is a folder. Expected a file"):
            tiler(source)
    for source in ("", " ", "\n"):
        with refused("is empty. Expected a file, an http"):
            tiler(source)


def test_a_system_that_opens_no_file(tiler, make_image, tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(60)]
    for path in paths:
        path.write_bytes(encoded(make_image, "PNG"))
    tiler(paths[0])  # what is imported late
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (50, hard))
    try:
        with refused(r"\d.png: the file cannot be opened: Too many open files. Check .*open at once ..ulimit -n"):
            tiler(paths)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(tiler(paths)["pixel_values"]) == 120


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "TIFF", "BMP"])
def test_closed(tiler, make_image, tmp_path, file_format):
    """As `with Image.open(path) as image: ...` leaves it, where nothing read its pixels."""
    path = tmp_path / "image"
    path.write_bytes(encoded(make_image, file_format))
    with Image.open(path) as image:
        pass
    with refused("its file was closed before its pixels were read. Call its `load"):
        tiler(image)
    with Image.open(path) as image:
        image.load()
    assert len(tiler(image)["pixel_values"]) == 2


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("data:image/png,abc", "of the form `data:image/...;base64"),
        ("data:image/png;base64", "of the form `data:image/...;base64"),
        ("data:image/png;base64,#!$", "base64"),
        ("data:image/png;base64,aGVsbG8=", "not an image"),
        ("aGVsbG8=", "not an image"),
        ("file:///etc/hostname", "neither an existing file"),
        ("x" * 3000, "base64|not an image"),
    ],
)
def test_bad_uri(tiler, uri, message):
    with refused(message, (ValueError, FileNotFoundError)) as caught:
        tiler(uri)
    assert len(str(caught.value)) < 400
