"""Files and servers made to do harm: only documented errors, in bounded time and memory. `make fuzz` tries far more of
them."""

import base64
import gzip
import http.server
import io
import random
import struct
import subprocess
import sys
import threading
import time
import tracemalloc

import jina_vlm.image_loading_jina_vlm as image_loading
import numpy as np
import pytest
import torch
from conftest import ROOT, serve
from hypothesis import given, settings
from hypothesis import strategies as st
from jina_vlm import JinaVLMImageProcessor
from PIL import Image

from benchmarks.fuzz import encode, mutate, seeds, with_checksums


SEEDS = seeds()
BYTES_PER_PIXEL = 30  # more than before, while an image is read: docs/robustness.md
DAMAGED = "damaged or incomplete|not an image in a format that Pillow can read"
PAST_LIMIT = "more pixels than Pillow's limit against decompression bombs"

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, of large and damaged images


@pytest.fixture(scope="module")
def tiler():
    return JinaVLMImageProcessor(max_tiles=1)


@pytest.fixture
def give(tiler, tmp_path):
    """The function `give(data, name="file")`: tiles of a file of these bytes."""

    def tiles(data: bytes, name: str = "file") -> torch.Tensor:
        path = tmp_path / name
        path.write_bytes(data)
        return tiler(path, return_tensors="pt")["pixel_values"]

    return tiles


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SEEDS))
def test_truncated_at_every_quarter(give, name):
    """Refused; or, where the first image of several is there as a whole, that one."""
    data = SEEDS[name]
    whole = give(data)
    for quarter in range(4):
        try:
            shown = give(data[: len(data) * quarter // 4])
        except ValueError as error:
            assert any(part in str(error) for part in DAMAGED.split("|"))
        else:
            assert quarter and any(kind in name for kind in ("animated", "several", "pages")), (
                f"{name} at {quarter} quarters"
            )
            assert torch.equal(shown, whole)


@pytest.mark.parametrize("name", list(SEEDS))
def test_an_ending_says_nothing(give, name):
    for ending in (".png", ".jpg", ".tiff", ".txt", ""):
        assert torch.equal(give(SEEDS[name], f"image{ending}"), give(SEEDS[name], name))


SIDES = [(20_000, 20_000), (65_535, 65_535), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (0, 5), (5, 0)]
DECLARED = {  # where a file of the format says its width and height, and how
    "colors.png": (16, ">II"),
    "plain.bmp": (18, "<ii"),
    "still.gif": (6, "<HH"),
    "plain.ppm": (3, None),
    "plain.jp2": (None, ">II"),
}


@pytest.mark.parametrize(("width", "height"), SIDES, ids=str)
@pytest.mark.parametrize("name", [name for name in DECLARED if name in SEEDS])
def test_absurd_sizes_are_refused_before_memory_is_taken(give, name, width, height):
    position, layout = DECLARED[name]
    data = SEEDS[name]
    if name == "plain.jp2":
        position = data.index(b"ihdr") + 4
        width, height = height, width
        codestream = data.index(b"\xff\x51") + 6
        data = data[:codestream] + struct.pack(layout, height, width) + data[codestream + 8 :]
    if layout is None:
        data = b"P6\n%d %d\n255\n" % (width, height) + bytes(100)
    elif layout == "<HH" and not 0 < min(width, height) <= max(width, height) <= 65_535:
        pytest.skip("cannot be said, or is not heeded: a GIF is as large as its frame, at least")
    else:
        data = data[:position] + struct.pack(layout, width, height) + data[position + struct.calcsize(layout) :]
        data = with_checksums(data) if name.endswith(".png") else data
    start = time.process_time()
    with pytest.raises(ValueError, match=f"{PAST_LIMIT}|{DAMAGED}|at least 1|200 times"):
        give(data)
    assert time.process_time() - start < 1


def jpeg(scans: int, width: int = 64, before: bytes = b"", behind: bytes = b"") -> bytes:
    """A progressive JPEG file of so many scans, all empty but the first; `before` stands before the others."""

    def segment(marker: int, body: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body

    data = (
        b"\xff\xd8"
        + segment(0xDB, bytes([0] + [1] * 64))
        + segment(0xC2, struct.pack(">BHHBBBB", 8, width, width, 1, 1, 0x11, 0))
    )
    # codes of one bit: of no difference, and of a run of 2 ** 14 empty blocks and more
    data += segment(0xC4, bytes([0x00, 1] + [0] * 16)) + segment(0xC4, bytes([0x10, 1] + [0] * 15 + [0xE0]))
    blocks = ((width + 7) // 8) ** 2
    data += segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(blocks // 8 + 1) + before
    bits = ("0" + "1" * 14) * -(-blocks // 32767)
    run = bytes(int(bits[i : i + 8].ljust(8, "1"), 2) for i in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    return data + (segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + run) * (scans - 1) + b"\xff\xd9" + behind


def test_jpeg_of_too_many_scans(give, tiler):
    """A file of 1 MB could keep a core busy for minutes."""
    assert len(give(jpeg(100))) == 2
    for data in (jpeg(101), jpeg(5000), jpeg(200, before=b"\xff\x01\xff\xff"), jpeg(200, before=b"\xff\xd7\xff\xff")):
        with pytest.raises(ValueError, match="a JPEG file of [0-9]+ scans; there may be at most 100"):
            give(data)
        with pytest.raises(ValueError, match="at most 100"):
            tiler(Image.open(io.BytesIO(data)))
    # Telephones append a video.
    assert len(give(jpeg(10, behind=b"\xff\xda\0\2" * 1000))) == 2


def test_formats_that_run_programs_are_not_decoded(tiler, tmp_path):
    """Pillow hands EPS to Ghostscript."""
    path = tmp_path / "program.eps"
    path.write_bytes(encode(Image.new("RGB", (9, 9)), "program.eps"))
    with pytest.raises(ValueError, match="not an image in a format that Pillow can read and that is read here"):
        tiler(path)
    with pytest.raises(ValueError, match="images in the format EPS are not read. Convert it to one of AVIF, BMP"):
        tiler(Image.open(path))
    assert len(tiler(Image.open(io.BytesIO(SEEDS["plain.bmp"])))["pixel_values"]) == 2


def try_file(tiler, data: bytes) -> bool:
    """Whether it becomes tiles; any error but `ValueError` is one of the test's."""
    try:
        shown = tiler("data:;base64," + base64.b64encode(data).decode(), return_tensors="pt")["pixel_values"]
    except ValueError as error:
        assert str(error).endswith((".", ")")) or "Shrink it" in str(error)
        return False
    assert shown.isfinite().all() and shown.abs().max() <= 1
    return True


def test_mutated_files(tiler):
    files, start = list(SEEDS.values()), time.process_time()
    shown = sum(try_file(tiler, mutate(random.Random(index), files)) for index in range(700))
    assert 50 < shown < 650, "else the mutations are too weak, or too strong"
    assert time.process_time() - start < 60


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.binary(max_size=200), st.sampled_from(sorted(SEEDS)), st.floats(0, 1), st.floats(0, 1))
def test_files_with_anything_in_them(data, name, start, end):
    file = SEEDS[name]
    start, end = sorted((int(len(file) * start), int(len(file) * end)))
    try_file(JinaVLMImageProcessor(max_tiles=1), file[:start] + data + file[end:])


MEASURE = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = [{root!r}, {root!r} + "/helpers"]
import conftest
from jina_vlm import JinaVLMImageProcessor
from PIL import Image

def held(which):
    return int(open("/proc/self/status").read().split(which + ":")[1].split()[0]) * 1024

tiler = JinaVLMImageProcessor()
tiler(Image.new("RGB", (3000, 3000)))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = held("VmRSS")
tiler(sys.argv[1])
print(held("VmHWM") - before)
"""


def memory(path) -> int:
    """Bytes that a fresh process takes more while it reads an image."""
    command = [sys.executable, "-c", MEASURE.format(root=str(ROOT / "tests")), str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def large(name: str, side: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # a turn takes a copy
    options = {"exif": exif} | ({"lossless": True} if name.endswith(".webp") else {})
    return encode(Image.new("RGB" if name.endswith((".jpeg", ".tiff")) else "RGBA", (side, side)), name, **options)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory(tmp_path):
    """Of the worst format: WebP's decoder keeps two images."""
    (tmp_path / "large.webp").write_bytes(large("large.webp", 4000))
    assert 16 * 4000**2 < memory(tmp_path / "large.webp") < BYTES_PER_PIXEL * 4000**2


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["large.webp", "large.png", "large.jpeg", "large.tiff", "scans.jpeg"])
def test_memory_and_time_at_the_limit(tmp_path, tiler, name):
    side = int((2 * Image.MAX_IMAGE_PIXELS) ** 0.5)
    (tmp_path / name).write_bytes(jpeg(100, width=side) if name.startswith("scans") else large(name, side))
    used = memory(tmp_path / name)
    start = time.process_time()
    tiler(tmp_path / name)
    seconds = time.process_time() - start
    print(f"{name}: {side} x {side}, {used / 1e9:.2f} GB, {seconds:.1f} s")
    assert used < BYTES_PER_PIXEL * side**2 and seconds < 30


# Servers -------------------------------------------------------------------------------------------------------------


class Hostile(http.server.BaseHTTPRequestHandler):
    """By path: what a server should not do."""

    image = encode(Image.fromarray(np.arange(4800, dtype=np.uint8).reshape(40, 40, 3)), "image.bmp")
    bomb = gzip.compress(bytes(50_000_000))  # a thousandth
    bombs = gzip.compress(bomb)

    def do_GET(self):
        whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(self.image) + self.image
        raw = {
            "/nonsense": b"NONSENSE\r\n\r\n",
            "/chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            "/header": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 2_000_000 + b"\r\n\r\n",
            "/closed": b"",
            "/huge": b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n",
            "/endless": b"HTTP/1.1 200 OK\r\n\r\n",
            "/short": whole[:-1854],
            "/file": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
            "/nowhere": b"HTTP/1.1 302 Found\r\n\r\n",
            "/loop": b"HTTP/1.1 302 Found\r\nLocation: /loop\r\n\r\n",
            "/whole": whole,
            "/slow-body": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(self.image),
            "/slow-header": b"HTTP/1.1 200 OK\r\n",
            "/slow-loop": b"HTTP/1.1 302 Found\r\nLocation: /slow-loop\r\n\r\n",
            "/silent": b"",
            "/continue": b"HTTP/1.1 100 Continue\r\n\r\n",
            "/bomb": self.compressed("gzip", self.bomb),
            "/bombs": self.compressed("gzip, gzip", self.bombs),
            "/brotli": self.compressed("br", self.bomb),
            "/half": self.compressed("gzip", gzip.compress(self.image)[:-200]),
            "/no-gzip": self.compressed("gzip", self.image),
            "/no-deflate": self.compressed("deflate", self.image),
        }[self.path]
        if self.path == "/slow-loop":
            time.sleep(0.4)
        self.wfile.write(raw)
        while self.path in ("/slow-body", "/slow-header", "/silent", "/continue", "/endless"):
            try:
                self.wfile.write({"/silent": b"", "/continue": raw, "/endless": bytes(100_000)}.get(self.path, b"x"))
                time.sleep(0.05 if self.path.startswith("/s") else 0)
            except OSError:
                break

    def compressed(self, encoding: str, data: bytes) -> bytes:
        return (
            f"HTTP/1.1 200 OK\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
        )

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nonsense", "NONSENSE"),
        ("/chunks", "illegal chunk header"),
        ("/header", "Receive buffer too long"),
        ("/closed", "disconnected without sending a response"),
        ("/huge", "larger than 10000000 bytes"),
        ("/endless", "larger than 10000000 bytes"),
        ("/short", "received 3000 bytes, expected 4854"),
        ("/file", "unsupported protocol 'file://'"),
        ("/nowhere", "the server answered 302 Found"),
        ("/loop", "Exceeded maximum allowed redirects"),
        ("/slow-body", "it took more than 1 seconds"),
        ("/slow-header", "it took more than 1 seconds"),
        ("/slow-loop", "it took more than 1 seconds"),
        ("/continue", "it took more than 1 seconds"),
        ("/silent", "timed out"),
        ("/bomb", "larger than 10000000 bytes"),
        ("/bombs", "its Content-Encoding is 'gzip, gzip'; expected one of identity, gzip"),
        ("/brotli", "its Content-Encoding is 'br'; expected one of identity, gzip"),
        ("/half", "its compressed data end too early"),
        ("/no-gzip", "incorrect header check"),
        ("/no-deflate", "while decompressing"),
    ],
)
def test_servers(tiler, monkeypatch, path, message):
    limits = {"MAX_DOWNLOAD_BYTES": 10_000_000}
    if message.startswith("it took"):
        limits["DOWNLOAD_SECONDS"] = 1
    elif path == "/silent":
        limits["URL_TIMEOUT_SECONDS"] = 0.5
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(Hostile) as url:
        start = time.monotonic()
        with (
            monkeypatch.context() as patch,
            pytest.raises(ValueError, match=f"Could not download the image at '{url}{path}': .*({message})"),
        ):
            for name, limit in limits.items():
                patch.setattr(image_loading, name, limit)
            tiler(f"{url}{path}")
        assert time.monotonic() - start < 20
        waiting = [
            thread.name for thread in threading.enumerate() if "run" in thread.name or "Executor" in thread.name
        ]
        assert not waiting, "a thread still waits for the server"
        assert len(tiler(f"{url}/whole")["pixel_values"]) == 2


def test_memory_of_a_decompression_bomb(monkeypatch, tiler):
    """50 MB of zeros in 50 kB: they are not decompressed past the limit."""
    monkeypatch.setattr(image_loading, "MAX_DOWNLOAD_BYTES", 1_000_000)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(Hostile) as url:
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="larger than 1000000 bytes"):
                tiler(f"{url}/bomb")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 20_000_000


@pytest.mark.parametrize(
    "url", ["http://", "https://[::1", "http://a..b/x.png", "http://\0/x", "http://127.0.0.1:abc/x", "http://\ud800/"]
)
def test_urls_that_are_none(tiler, url):
    with pytest.raises(ValueError, match="Could not download the image at "):
        tiler(url)
