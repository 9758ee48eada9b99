"""Hostile images in great number: random bytes and mutated files of every format, through the image processor.

Each must become tiles, or be refused by a `ValueError`, in at most `SECONDS` of a core's time and with at most `BYTES`
more memory. Half of the files come from mutations drawn from a seed, in this process; the other half from a fuzzer
guided by coverage of this code and of Pillow's Python (atheris), in a second one, where that is installed.

    python -m benchmarks.fuzz [--files 100000] [--seed 0]

What breaks a promise is written to `--keep` and named; the exit status is then 1.
"""

import argparse
import base64
import faulthandler
import importlib.util
import io
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, features

from benchmarks.side_by_side import memory_bytes


SECONDS = 30  # of one core, for one image
BYTES = 5.4e9  # more than before, while one image is read; see docs/robustness.md
EXTREMES = (0, 1, 2, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def seeds(side: int = 24) -> dict[str, bytes]:
    """A small valid file of each kind, by name; the ending says the format."""
    y, x = np.mgrid[:side, : side + 6]
    rgb = np.dstack([x * 9 % 256, y * 10 % 256, (x + y) * 5 % 256]).astype(np.uint8)
    image, other = Image.fromarray(rgb), Image.fromarray(rgb[::-1, ::-1].copy())
    gray, alpha = image.convert("L"), image.copy()
    alpha.putalpha(gray)
    sixteen = Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [other, image]}
    kinds = {
        "baseline.jpeg": (image, {"exif": exif}),
        "progressive.jpeg": (image, {"progressive": True}),
        "cmyk.jpeg": (image.convert("CMYK"), {}),
        "several.mpo": (image, frames),
        "colors.png": (image, {"exif": exif}),
        "alpha.png": (alpha, {}),
        "palette.png": (image.convert("P"), {"transparency": 3}),
        "one-bit.png": (image.convert("1"), {}),
        "16-bit.png": (sixteen, {}),
        "animated.png": (image, frames),
        "lossy.webp": (image, {"quality": 50}),
        "lossless.webp": (alpha, {"lossless": True, "exif": exif}),
        "animated.webp": (image, frames),
        "still.gif": (image, {"transparency": 2}),
        "animated.gif": (image, frames),
        "plain.tiff": (image, {}),
        "lzw.tiff": (alpha, {"compression": "tiff_lzw"}),
        "deflate.tiff": (sixteen, {"compression": "tiff_adobe_deflate"}),
        "jpeg.tiff": (image, {"compression": "jpeg"}),
        "fax.tiff": (image.convert("1"), {"compression": "group4"}),
        "float.tiff": (Image.fromarray(rgb[..., 0].astype(np.float32) / 255), {}),
        "pages.tiff": (image, frames),
        "plain.bmp": (image, {}),
        "palette.bmp": (image.convert("P"), {}),
        "plain.ppm": (image, {}),
        "icon.ico": (alpha, {"sizes": [(16, 16)]}),
    }
    if features.check("jpg_2000"):
        kinds["plain.jp2"] = (image, {})
    if features.check("avif"):
        kinds["plain.avif"] = (alpha, {"speed": 10})
    return {name: encode(image, name, **options) for name, (image, options) in kinds.items()}


def encode(image: Image.Image, name: str, **options) -> bytes:
    """The image as a file, in the format that the name's ending says."""
    Image.init()
    file = io.BytesIO()
    image, *more = (
        one.copy() for one in (image, *options.pop("append_images", []))
    )  # saving leaves settings in an image
    image.save(file, Image.EXTENSION[Path(name).suffix], append_images=more, **options)
    return file.getvalue()


def with_checksums(png: bytes) -> bytes:
    """The same chunks with right checksums, so that what was changed in them is looked at."""
    made, position = bytearray(png[:8]), 8
    while position + 8 <= len(png):
        (length,) = struct.unpack_from(">I", png, position)
        body = png[position + 4 : position + 8 + length]
        made += png[position : position + 4] + body + struct.pack(">I", zlib.crc32(body))
        position += 12 + length
    return bytes(made)


def mutate(rng: random.Random, files: list[bytes]) -> bytes:
    """Random bytes, or a file with one to five changes."""
    if rng.random() < 0.05:
        return rng.choice(files)[: rng.choice((0, 2, 4, 12, 26))] + rng.randbytes(rng.randrange(300))
    data = bytearray(rng.choice(files))
    is_png = data.startswith(b"\x89PNG")
    for _ in range(rng.randint(1, 5)):
        # rather in front, where the sizes stand
        position = int(len(data) * rng.random() ** rng.choice((1, 3)))
        match rng.randrange(7):
            case 0:
                data[position : position + 1] = rng.randbytes(1)
            case 1:
                data[position : position + 1] = (
                    bytes([data[position] ^ 1 << rng.randrange(8)]) if position < len(data) else b""
                )
            case 2:
                number = rng.choice(EXTREMES).to_bytes(4, rng.choice(("little", "big")))
                data[position : position + 4] = number
            case 3:
                number = (rng.choice(EXTREMES) % 65536).to_bytes(2, rng.choice(("little", "big")))
                data[position : position + 2] = number
            case 4:
                del data[position : position + rng.choice((1, 2, 4, 50))]
            case 5:
                other = rng.choice(files)
                start = rng.randrange(len(other))
                data[position:position] = other[start : start + rng.choice((1, 4, 40, 400))]
            case 6:
                if rng.random() < 0.2:
                    del data[position:]
        if not data:
            break
    return with_checksums(bytes(data)) if is_png and rng.random() < 0.7 else bytes(data)


class Promises:
    """Gives files to the image processor, and counts how each ends.

    Args:
        tiler: A `JinaVLMImageProcessor`.
        keep: A folder for files that break a promise.
        kind: Of the files, for names.
    """

    def __init__(self, tiler, keep: Path, kind: str):
        self.tiler, self.keep, self.kind = tiler, keep, kind
        self.ends, self.broken = Counter(), 0
        self.slowest = (0.0, "")
        self.tiler(Image.new("RGB", (64, 64)))  # what is imported and set up once is no image's fault
        self.before = self.peak = memory_bytes("VmHWM")
        self.largest = ""

    def try_file(self, data: bytes, name: str) -> None:
        # What never comes back ends the process, says where it was, and leaves the file. (Slower on a busy machine.)
        (self.keep / f"last-{self.kind}").write_bytes(data)
        faulthandler.dump_traceback_later(20 * SECONDS, exit=True)
        start = time.process_time()
        fault = ""
        try:
            self.tiler("data:;base64," + base64.b64encode(data).decode(), max_tiles=1)
            end = "tiles"
        except ValueError as error:
            # Most messages name the file first, and in parentheses what the decoder said.
            end = (
                (str(error).partition(": ")[2] or str(error))
                .partition("(")[0]
                .partition(", got")[0]
                .strip()
                .rstrip(".")
            )
        except BaseException as error:
            end = fault = f"{type(error).__name__}: {error}"
        seconds = time.process_time() - start
        faulthandler.cancel_dump_traceback_later()
        self.ends["".join("#" if letter.isdigit() else letter for letter in end)] += 1
        self.slowest = max(self.slowest, (seconds, name))
        if (peak := memory_bytes("VmHWM")) > self.peak:
            self.peak, self.largest = peak, name
        if peak > self.before + BYTES:
            fault = f"{(peak - self.before) / 1e9:.2f} GB"
        if seconds > SECONDS:
            fault = f"{seconds:.1f} s"
        if fault:
            self.broken += 1
            (self.keep / name).write_bytes(data)
            print(f"{self.keep / name}: {fault}", flush=True)

    def report(self, title: str, seconds: float) -> None:
        number = sum(self.ends.values())
        print(f"\n{title}: {number:,} files in {seconds:,.0f} s, {1000 * seconds / max(number, 1):.1f} ms each")
        for end, count in self.ends.most_common():
            print(f"  {count:>7,}  {end}")
        print(
            f"  slowest {self.slowest[0]:.2f} s ({self.slowest[1]}); "
            f"most memory {(self.peak - self.before) / 1e9:.2f} GB ({self.largest})"
        )
        print(f"  promises broken: {self.broken}", flush=True)


def run_mutations(files: int, seed: int, keep: Path) -> None:
    from jina_vlm import JinaVLMImageProcessor

    promises, start = Promises(JinaVLMImageProcessor(), keep, "mutations"), time.perf_counter()
    originals = list(seeds().values())
    for index in range(files):
        promises.try_file(mutate(random.Random(seed * 10**9 + index), originals), f"mutation-{seed}-{index}")
    promises.report("Mutations", time.perf_counter() - start)
    sys.exit(promises.broken > 0)


def run_guided(files: int, seed: int, keep: Path) -> None:
    import atheris
    from jina_vlm import JinaVLMImageProcessor

    promises, start, number = Promises(JinaVLMImageProcessor(), keep, "guided"), time.perf_counter(), 0

    def one(data: bytes) -> None:
        nonlocal number
        promises.try_file(data, f"guided-{seed}-{number}")
        number += 1
        if number == files:
            promises.report("Guided by coverage", time.perf_counter() - start)
            os._exit(promises.broken > 0)  # atheris would end the process without a word

    with tempfile.TemporaryDirectory() as corpus:
        for name, data in seeds().items():
            Path(corpus, name).write_bytes(data)
        options = [f"-seed={seed + 1}", "-max_len=4096", "-rss_limit_mb=0", f"-timeout={30 * SECONDS}", "-verbosity=0"]
        atheris.Setup([sys.argv[0], corpus, *options], one)
        atheris.Fuzz()


MUTATIONS = """
from benchmarks import fuzz
fuzz.run_mutations(*arguments)
"""
# Before anything else imports them, Pillow and this code are imported with counters of what is reached.
GUIDED = """
import atheris
MODULES = ["PIL", "jina_vlm.image_loading_jina_vlm", "jina_vlm.image_processing_jina_vlm"]
with atheris.instrument_imports(include=MODULES):
    from benchmarks import fuzz
    import jina_vlm
    fuzz.Image.init()
fuzz.run_guided(*arguments)
"""


def run(kind: str, code: str, files: int, seed: int, keep: Path) -> bool:
    """One half in a process of its own, whether it ended well. The decoders' complaints go to a log."""
    log = keep / f"{kind}.log"
    arguments = f"from pathlib import Path\narguments = {files}, {seed}, Path({str(keep)!r})\n"
    with log.open("w") as errors:
        status = subprocess.run([sys.executable, "-W", "ignore", "-c", arguments + code], stderr=errors).returncode
    if status:
        print(f"The {kind} half ended with {status} at the file {keep}/last-{kind}: see {log}", flush=True)
    return status == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000, help="how many in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: %(default)s)")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="where files go that break a promise")
    args = parser.parse_args()
    args.keep.mkdir(parents=True, exist_ok=True)
    half = args.files // 2
    fine = run("mutations", MUTATIONS, half, args.seed, args.keep)
    if importlib.util.find_spec("atheris") is None:
        sys.exit("\natheris is not installed (pip install atheris): the guided half was left out.")
    fine = run("guided", GUIDED, args.files - half, args.seed, args.keep) and fine
    sys.exit(not fine)


if __name__ == "__main__":
    main()
