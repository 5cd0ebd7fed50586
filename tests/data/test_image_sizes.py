"""Pictures with large remarks, in newer formats or of many pixels: decoded as they are, in bounded
memory."""

import io
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
from pictures import encoded, noise
from PIL import Image, PngImagePlugin

from uno_ds.data import images
from uno_ds.data.images import BadRow, ImageSettings, decode
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.settings import build

SETTINGS = ImageSettings()


def chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + name + content + checksum


LONG = b"x" * (2 * PngImagePlugin.MAX_TEXT_CHUNK)
PLAIN = chunk(b"tEXt", b"note\0" + LONG)
REMARKS = {
    "compressed text": chunk(b"zTXt", b"note\0\0" + zlib.compress(LONG)),
    "international text": chunk(b"iTXt", b"note\0\1\0\0\0" + zlib.compress(LONG)),
    "profile": chunk(b"iCCP", b"icc\0\0" + zlib.compress(LONG)),
    "much text in all": PLAIN * (PngImagePlugin.MAX_TEXT_MEMORY // len(LONG) + 1),
}


@pytest.mark.parametrize("name", REMARKS)
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_png_is_read_whatever_the_size_of_its_texts_and_profile(name, place):
    picture = noise(24, 16)
    exif = picture.getexif()
    exif[0x0112] = 6
    data = encoded(picture, exif=exif)
    # Behind the header, or before the end.
    position = (
        33 if place == "before" and name == "profile" or place == "before" else len(data) - 12
    )
    if name == "profile" and place == "after":
        position = data.index(b"IDAT") - 4
    data = data[:position] + REMARKS[name] + data[position:]
    with pytest.raises(ValueError), Image.open(io.BytesIO(data)) as image:
        image.load()
    got = decode(data, SETTINGS)
    assert np.array_equal(got, picture.transpose(Image.Transpose.ROTATE_270))


def test_a_png_that_breaks_off_inside_a_large_text_is_a_bad_row():
    data = encoded(noise(24, 16))
    broken = data[:33] + REMARKS["compressed text"][:-9]
    with pytest.raises(BadRow) as caught:
        decode(broken, SETTINGS)
    assert caught.value.cause == "undecodable_image"


def test_avif_is_read_alone_and_in_an_archive(tmp_path):
    data = encoded(Image.new("RGB", (24, 16), (200, 30, 40)), "AVIF", quality=100)
    got = np.asarray(decode(data, SETTINGS)).astype(int)
    # At quality 100 only the conversion to luma and chroma rounds, by a few levels.
    assert np.abs(got - (200, 30, 40)).max() <= 4
    kinds = {
        "avif": data,
        "gif": encoded(noise(24, 16), "GIF"),
        "tif": encoded(noise(24, 16), "TIFF"),
    }
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, (suffix, content) in enumerate(kinds.items()):
            for name, member in ((f"{number}.{suffix}", content), (f"{number}.txt", b"a cup")):
                entry = tarfile.TarInfo(name)
                entry.size = len(member)
                archive.addfile(entry, io.BytesIO(member))
    source = Source(build(SourceSettings, {"path": str(tmp_path / "a.tar")}))
    assert (len(source), source.layout) == (3, "t2i")
    examples = [source.read(row, np.random.default_rng(0)) for row in range(3)]
    assert all(example.image.size == (24, 16) for example in examples)


def wide(mode: str) -> Image.Image:
    """Different values in each row, the largest in the last."""
    ramp = np.linspace(0, 1, 48 * 16).reshape(48, 16)
    return Image.fromarray(
        {
            "I;16": (ramp * 40_000).astype(np.uint16),
            "I": (ramp * 200_000).astype(np.int32),
            "F": (ramp * 255).astype(np.float32),
        }[mode]
    )


def alpha(mode: str) -> Image.Image:
    image = noise(16, 48).convert("RGBA")
    image.putalpha(
        Image.fromarray(np.arange(48 * 16, dtype=np.uint16).astype(np.uint8).reshape(48, 16))
    )
    if mode == "P":
        return image.convert("RGB").quantize(16)
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "RGBA", "LA", "P"])
def test_a_picture_converted_piece_by_piece_is_the_one_converted_as_a_whole(mode, monkeypatch):
    image = wide(mode) if mode in ("I;16", "I", "F") else alpha(mode)
    kind = "TIFF" if mode in ("I", "F") else "PNG"
    data = encoded(image, kind, **({"transparency": 3} if mode == "P" else {}))
    whole = np.asarray(decode(data, SETTINGS))
    monkeypatch.setattr(images, "PIECE_PIXELS", 16 * 5)  # 48 rows are no multiple of 5
    assert np.array_equal(decode(data, SETTINGS), whole) and len(np.unique(whole)) > 2


# Peak resident memory above that of the process before it decoded, in bytes a pixel of the source.
MEASURE = """
import sys, zlib
from uno_ds.data.images import ImageSettings, decode

def chunk(name, content):
    checksum = zlib.crc32(name + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + name + content + checksum

def kilobytes(name):
    status = open("/proc/self/status").read()
    return int(status.partition(name + ":")[2].split()[0])

def png(side, depth, colour, bytes_a_pixel):
    packer = zlib.compressobj(1)
    row = bytes(1 + side * bytes_a_pixel)
    pixels = b"".join([packer.compress(row) for _ in range(side)] + [packer.flush()])
    header = side.to_bytes(4, "big") * 2 + bytes([depth, colour, 0, 0, 0])
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\\x89PNG\\r\\n\\x1a\\n" + b"".join(chunks)

side, *kind = (int(word) for word in sys.argv[1:])
decode(png(64, *kind), ImageSettings())  # loads what Pillow loads late
data = png(side, *kind)
before = kilobytes("VmRSS")
assert decode(data, ImageSettings()).size == (side, side)
print((kilobytes("VmHWM") - before) * 1024 / side**2)
"""


@pytest.mark.parametrize("kind", ["16-bit grey", "RGBA", "RGB"])
def test_decoding_takes_about_eight_bytes_a_pixel(kind):
    depth, colour, width = {"16-bit grey": (16, 0, 2), "RGBA": (8, 6, 4), "RGB": (8, 2, 3)}[kind]
    words = [str(word) for word in (4000, depth, colour, width)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *words], text=True, capture_output=True, check=True
    )
    # Two pictures of four bytes a pixel; a piece in double precision, several times, is 2 bytes a
    # pixel at this size.
    assert float(done.stdout) < 8 + 3
