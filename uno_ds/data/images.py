"""From encoded bytes to the pixels that a model reads: decoding, which raises nothing but BadRow,
and resizing to multiples of a stride."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from uno_ds.settings import SettingsError, printable, setting

# No format that PIL hands to another program (EPS) or that is not a picture of the web.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Texts and colour profiles: pixels do not depend on them. The EXIF block, which says how a picture
# is turned, stays.
PNG_REMARKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
# Pixels of one piece where a conversion needs far more memory than its input and output have.
PIECE_PIXELS = 1 << 20
LONGEST_DETAIL = 400


class BadRow(Exception):
    """A row that cannot be used. `cause` is a short snake_case name under which it is counted;
    `detail` is for the log, in one line."""

    def __init__(self, cause: str, detail: str = ""):
        detail = printable(detail, LONGEST_DETAIL)
        super().__init__(cause, detail)
        self.cause, self.detail = cause, detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}" if self.detail else self.cause


@dataclass(frozen=True)
class ImageSettings:
    max_side: int = setting(
        1024,
        minimum=1,
        doc="Largest longer side in pixels after resizing.",
        maximum=65_536,
    )
    min_side: int = setting(
        256,
        minimum=1,
        doc="Shorter side in pixels to which smaller images are enlarged, as far as the other "
        "bounds allow.",
        maximum=65_536,
    )
    max_pixels: int = setting(
        1024 * 1024,
        minimum=1,
        doc="Largest number of pixels after resizing.",
        maximum=10**9,
    )
    max_aspect_ratio: float = setting(
        8.0,
        minimum=1,
        doc="Longer side over shorter side beyond which an image is skipped.",
        maximum=1e4,
    )
    min_source_side: int = setting(
        8,
        minimum=1,
        doc="Shorter side in pixels below which a source image is skipped.",
        maximum=65_536,
    )
    max_source_pixels: int = setting(
        100_000_000,
        minimum=1,
        maximum=10**9,
        doc="Pixels above which a source image is skipped without being decoded; decoding takes up "
        "to about 8 bytes of memory a pixel.",
    )

    def __post_init__(self) -> None:
        if self.min_side > self.max_side:
            raise SettingsError(
                "min_side",
                f"must be at most max_side; got {self.min_side} with max_side {self.max_side}.",
            )
        if self.min_side**2 > self.max_pixels:
            raise SettingsError(
                "min_side",
                f"squared must be at most max_pixels; got {self.min_side} with max_pixels "
                f"{self.max_pixels}.",
            )
        if self.min_source_side**2 > self.max_source_pixels:
            raise SettingsError(
                "min_source_side",
                f"no image has sides of at least {self.min_source_side} and at most "
                f"max_source_pixels {self.max_source_pixels} pixels.",
            )


def decode(data: bytes, settings: ImageSettings) -> Image.Image:
    """The upright RGB picture in `data`: EXIF rotation applied, transparency on white, the first
    frame of an animation.

    Raises BadRow and nothing else, whatever the bytes: empty_image, undecodable_image,
    image_too_large, image_too_small, aspect_ratio. The last three follow from the header, before
    any pixel is decoded. Decoding takes at most about 8 bytes of memory a pixel of the source."""
    if not data:
        raise BadRow("empty_image", "no bytes")
    try:
        image = _upright(_load(data, settings))
        return _to_rgb(image)
    except BadRow:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRow("image_too_large", str(error)) from None
    except Exception as error:  # PIL's plugins raise whatever the bytes lead them to
        raise BadRow("undecodable_image", f"{type(error).__name__}: {error}") from None


def target_size(width: int, height: int, stride: int, settings: ImageSettings) -> tuple[int, int]:
    """(width, height) in pixels that `resize` gives: multiples of `stride`, at least one of it.

    `max_side` and `max_pixels` are never exceeded (but for the one stride); `min_side` holds where
    they allow it."""
    longer, shorter = max(width, height), min(width, height)
    scale = min(1.0, settings.max_side / longer)
    scale = max(scale, settings.min_side / shorter)
    scale = min(scale, settings.max_side / longer, (settings.max_pixels / (width * height)) ** 0.5)
    most, area = _cell_bounds(stride, settings)
    least = -(-settings.min_side // stride)
    long, short = (min(most, max(1, round(side * scale / stride))) for side in (longer, shorter))
    if (
        short < least <= most
        and long * least <= area
        and shorter * scale >= settings.min_side * 0.999
    ):
        short, long = least, max(long, least)
    if long * short > area:
        # Rounding both down keeps the area, since the exact sides keep it; one stride at least may
        # still be too much.
        short = max(1, int(shorter * scale / stride))
        long = max(1, min(int(longer * scale / stride), area // short))
    return (long * stride, short * stride) if width >= height else (short * stride, long * stride)


# Most pixels of an image that the public BAGEL's inference reads.
INFERENCE_PIXELS = 14 * 14 * 9 * 1024


def inference_size(
    width: int, height: int, stride: int, max_side: int, min_side: int
) -> tuple[int, int]:
    """(width, height) that the public BAGEL's inference resizes an image to. It differs from
    `target_size` in its roundings: to whole pixels, then to strides, and once more after each bound
    that the first size exceeds."""

    def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
        columns, rows = (max(1, round(round(side * scale) / stride)) for side in size)
        return columns * stride, rows * stride

    scale = min(1.0, max_side / max(width, height))
    size = scaled((width, height), max(scale, min_side / min(width, height)))
    if size[0] * size[1] > INFERENCE_PIXELS:
        # The public code scales the sides by the ratio of the areas, not by its root.
        size = scaled(size, INFERENCE_PIXELS / (size[0] * size[1]))
    if max(size) > max_side:
        size = scaled(size, max_side / max(size))
    return size


def resize(image: Image.Image, stride: int, settings: ImageSettings) -> Image.Image:
    """The image at its `target_size`; the aspect ratio is kept up to the rounding to `stride`."""
    return resize_to(image, target_size(*image.size, stride, settings))


def resize_to(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at (width, height)."""
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def largest_cell_count(stride: int, settings: ImageSettings) -> int:
    """Most `stride` x `stride` cells that any image can have after `resize`: what a token budget
    must hold.

    An upper bound; exact unless the largest rectangle of cells is too long for `max_aspect_ratio`.
    """
    most, area = _cell_bounds(stride, settings)
    return max(columns * min(most, area // columns) for columns in range(1, min(most, area) + 1))


def to_array(image: Image.Image) -> np.ndarray:
    """RGB picture as float32 [3, height, width] in [-1, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    return np.ascontiguousarray((pixels / 127.5 - 1).transpose(2, 0, 1))


def _cell_bounds(stride: int, settings: ImageSettings) -> tuple[int, int]:
    """Most cells along a side, and most cells in all."""
    return max(1, settings.max_side // stride), max(1, settings.max_pixels // stride**2)


def _check_header(width: int, height: int, settings: ImageSettings) -> None:
    if width * height > settings.max_source_pixels:
        raise BadRow(
            "image_too_large",
            f"{width}x{height} pixels, more than {settings.max_source_pixels} in all",
        )
    if min(width, height) < settings.min_source_side:
        raise BadRow(
            "image_too_small",
            f"{width}x{height} pixels, a side shorter than {settings.min_source_side}",
        )
    if max(width, height) > settings.max_aspect_ratio * min(width, height):
        raise BadRow(
            "aspect_ratio", f"{width}x{height} pixels, beyond {settings.max_aspect_ratio} to 1"
        )


def _load(data: bytes, settings: ImageSettings) -> Image.Image:
    """The decoded picture. Raises whatever Pillow raises, and BadRow."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_header(*image.size, settings)
        image.load()
        return image
    except ValueError:
        # Pillow refuses a PNG whose texts or profile exceed its memory limits.
        if data.startswith(PNG_SIGNATURE) and (bare := _without_remarks(data)) != data:
            return _load(bare, settings)
        raise


def _without_remarks(data: bytes) -> bytes:
    """A PNG without the chunks of PNG_REMARKS. Where its chunks break off, the rest is kept."""
    kept, position = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        end = position + 4 + 4 + length + 4  # length, name, content, checksum
        if data[position + 4 : position + 8] not in PNG_REMARKS:
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image  # a broken EXIF block says nothing about the pixels, which were decoded


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _wide_to_grey(image).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return _on_white(image)
    return image.convert("RGB")


def _pieces(image: Image.Image) -> list[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) of whole rows of at most about PIECE_PIXELS pixels, from top
    to bottom."""
    width, height = image.size
    rows = max(1, PIECE_PIXELS // width)
    return [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]


def _on_white(image: Image.Image) -> Image.Image:
    result = Image.new("RGB", image.size)
    for box in _pieces(image):
        piece = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", piece.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, piece).convert("RGB"), box)
    return result


def _values(image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    """Finite values of a wide grey picture in `box`, at least 0."""
    values = np.asarray(image.crop(box)).astype(np.float64)
    return np.nan_to_num(values, posinf=0.0, neginf=0.0).clip(min=0)


def _wide_to_grey(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and floating-point grey to 8 bits; the white level is the smallest usual one
    that holds the values."""
    pieces = _pieces(image)
    if image.mode.startswith("I;16"):
        white = 65535.0
    else:
        usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        largest = max(_values(image, box).max() for box in pieces)
        white = next((level for level in usual if largest <= level), largest)
    grey = Image.new("L", image.size)
    for box in pieces:
        values = (_values(image, box) / white * 255).round().astype(np.uint8)
        grey.paste(Image.fromarray(values), box)
    return grey
