"""URLs, as browsers read them. Ways in other than these are in `test_image_processor.py`, servers that do harm in
`test_hostile_files.py`."""

import base64
import gzip
import http.server
import io
import urllib.parse
import zlib

import numpy as np
import pytest
from conftest import make_image, serve
from jina_vlm.image_loading_jina_vlm import open_image
from PIL import Image


RGB = make_image(30, 40)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "PNG")
    return file.getvalue()


def bare_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


ENCODINGS = {
    "identity": lambda data: data,
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "GZip": gzip.compress,
    "deflate": zlib.compress,
    "deflate, bare": bare_deflate,
    "deflate, small window": lambda data: (c := zlib.compressobj(wbits=9)).compress(data) + c.flush(),
}
PATHS = {  # what is asked for, and what the server should see
    "/größe.png": "/größe.png",
    "/日本.jpg": "/日本.jpg",
    "/%E6%97%A5%E6%9C%AC.jpg": "/日本.jpg",
    "/a b.png": "/a b.png",
    "/a%20b.png": "/a b.png",
    "/x.png?q=ä&r=1 2": "/x.png?q=ä&r=1 2",
    "/x.png#part": "/x.png",
    "/x.png?width=100&url=http://other/ä.png": "/x.png?width=100&url=http://other/ä.png",
    "/a/../b.png": "/b.png",
    "/[x]'(1).png": "/[x]'(1).png",
    "": "/",
}


class Server(http.server.BaseHTTPRequestHandler):
    """By the first part of the path: an encoding, a redirect, credentials. All else is the image, if its path is
    known."""

    def do_GET(self):
        path, _, query = self.path.partition("?")
        kind, _, rest = urllib.parse.unquote(path).removeprefix("/").partition("/")
        status, headers, body = 200, {}, png()
        if kind == "encoded":
            headers["Content-Encoding"] = rest.partition(",")[0]
            body = ENCODINGS[rest](body)
        elif kind == "redirect":
            status, times = 302, int(rest)
            headers["Location"] = f"/redirect/{times - 1}" if times > 1 else f"http://{self.headers['Host']}/größe.png"
        elif kind == "private":
            expected = "Basic " + base64.b64encode(rest.encode()).decode()
            status = 200 if self.headers["Authorization"] == expected else 401
        elif urllib.parse.unquote(self.path) not in PATHS.values():
            status = 404
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, urllib.parse.quote(value, safe="/:,-"))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def url():
    with serve(Server) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        yield url


def assert_opens(source: str):
    np.testing.assert_array_equal(np.asarray(open_image(source)), RGB)


@pytest.mark.parametrize("path", list(PATHS))
def test_characters(url, path):
    assert_opens(url + path)


def test_scheme_of_any_case(url):
    assert_opens(url.replace("http://", "HTTP://") + "/größe.png")
    assert_opens(url.replace("http://", "Http://") + "/größe.png")
    assert_opens("DATA:image/png;base64," + base64.b64encode(png()).decode())


@pytest.mark.parametrize(
    ("userinfo", "seen"), [("user:password", "user:password"), ("user:p%40ss%2F", "user:p@ss/"), ("token", "token:")]
)
def test_credentials(url, userinfo, seen):
    """They are sent, and shown in no message."""
    host = url.removeprefix("http://")
    assert_opens(f"http://{userinfo}@{host}/private/{urllib.parse.quote(seen, safe='')}")
    with pytest.raises(ValueError) as error:
        open_image(f"http://{userinfo}@{host}/private/other")
    assert f"Could not download the image at 'http://***@{host}/private/other': the server answered 401" in str(
        error.value
    )
    assert userinfo not in str(error.value)


@pytest.mark.parametrize("encoding", list(ENCODINGS))
def test_encodings(url, encoding):
    assert_opens(f"{url}/encoded/{urllib.parse.quote(encoding)}")


def test_redirects(url):
    assert_opens(f"{url}/redirect/1")
    assert_opens(f"{url}/redirect/10")
    with pytest.raises(ValueError, match="Exceeded maximum allowed redirects"):
        open_image(f"{url}/redirect/11")


def test_status(url):
    with pytest.raises(
        ValueError, match=f"Could not download the image at '{url}/other.png': the server answered 404 Not Found"
    ):
        open_image(f"{url}/other.png")


def test_a_long_url_is_shortened(url):
    with pytest.raises(ValueError) as error:
        open_image(f"{url}/{'x' * 3000}.png")
    assert len(str(error.value)) < 300
