"""Images: any bytes give a picture or a BadRow, and any picture gets sides that a model can
take."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pictures import encoded, noise
from PIL import Image

from uno_ds.data.images import (
    BadRow,
    ImageSettings,
    decode,
    largest_cell_count,
    resize,
    target_size,
    to_array,
)
from uno_ds.settings import SettingsError, build

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:PIL"
)  # of EXIF blocks that are broken on purpose
SETTINGS = ImageSettings()
RED, WHITE = (200, 30, 40), (255, 255, 255)


def pixel(data: bytes, x: int, y: int) -> tuple[int, ...]:
    image = decode(data, SETTINGS)
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def cause_of(data: bytes, settings: ImageSettings = SETTINGS) -> str:
    with pytest.raises(BadRow) as caught:
        decode(data, settings)
    assert caught.value.cause in str(caught.value)
    return caught.value.cause


def half_transparent(mode: str) -> Image.Image:
    """Left half opaque RED (or its grey), right half of the same colour but invisible."""
    image = Image.new("RGBA", (16, 16), (*RED, 255))
    image.paste((*RED, 0), (8, 0, 16, 16))
    return image.convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_invisible_pixels_become_white_whatever_colour_they_hide(kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encoded(half_transparent("RGBA"), kind, **options)
    assert pixel(data, 2, 8) == RED and pixel(data, 13, 8) == WHITE


def test_half_transparency_is_mixed_with_white():
    assert pixel(encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 128))), 5, 5) == (127, 127, 127)


def test_grey_with_alpha_is_laid_on_white():
    data = encoded(half_transparent("LA"))
    grey = Image.new("RGB", (1, 1), RED).convert("L").getpixel((0, 0))
    assert pixel(data, 2, 8) == (grey,) * 3 and pixel(data, 13, 8) == WHITE


def test_palette_gives_its_colours_and_a_transparent_entry_gives_white():
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, *RED])
    image.paste(0, (8, 0, 16, 16))
    assert pixel(encoded(image), 13, 8) == (0, 0, 0)
    for kind in ("PNG", "GIF"):
        data = encoded(image, kind, transparency=0)
        assert pixel(data, 2, 8) == RED and pixel(data, 13, 8) == WHITE


def test_a_transparent_key_colour_of_an_rgb_image_gives_white():
    image = Image.new("RGB", (16, 16), RED)
    image.paste((1, 2, 3), (8, 0, 16, 16))
    data = encoded(image, transparency=(1, 2, 3))
    assert pixel(data, 2, 8) == RED and pixel(data, 13, 8) == WHITE


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_converted_and_not_inverted(kind):
    got = pixel(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), kind), 5, 5)
    assert np.abs(np.array(got) - (255, 0, 0)).max() < 12


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_range(kind):
    ramp = np.repeat(np.linspace(0, 65535, 64, dtype=np.uint16)[None], 16, axis=0)
    image = decode(encoded(Image.fromarray(ramp), kind), SETTINGS)
    assert [image.getpixel((x, 3)) for x in (0, 63)] == [(0,) * 3, WHITE]
    assert abs(image.getpixel((32, 3))[0] - 32 / 63 * 255) < 1.5


def test_floating_point_and_32_bit_grey_keep_their_range():
    ramp = np.repeat(np.linspace(0, 1, 64, dtype=np.float32)[None], 16, axis=0)
    for values in (ramp, ramp * 255, (ramp * 65535).astype(np.int32)):
        image = decode(encoded(Image.fromarray(values), "TIFF"), SETTINGS)
        assert (
            image.getpixel((63, 3)) == WHITE
            and abs(image.getpixel((32, 3))[0] - 32 / 63 * 255) < 1.5
        )


def test_bilevel_and_grey_are_converted():
    assert pixel(encoded(Image.new("1", (16, 16), 1)), 5, 5) == WHITE
    assert pixel(encoded(Image.new("L", (16, 16), 77)), 5, 5) == (77, 77, 77)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    """A picture stored turned, with the tag that says so, comes out as it was taken."""
    upright = Image.new("RGB", (24, 16), WHITE)
    upright.paste(RED, (0, 0, 12, 8))
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright if undo[orientation] is None else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(encoded(stored, exif=exif), SETTINGS), upright)


def test_a_broken_exif_block_does_not_cost_the_picture():
    data = encoded(noise(32, 24), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage")
    assert decode(data, SETTINGS).size == (32, 24)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_truncated_image_is_a_bad_row(kind, share):
    data = encoded(noise(64, 64), kind)
    assert cause_of(data[: int(len(data) * share)]) == "undecodable_image"


def test_bytes_that_are_no_image_are_bad_rows():
    assert cause_of(b"") == "empty_image"
    assert cause_of(b"hello, this is text") == "undecodable_image"
    assert cause_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n") == "undecodable_image"


def test_sizes_out_of_bounds_are_bad_rows_with_their_own_cause():
    assert cause_of(encoded(Image.new("RGB", (3, 3)))) == "image_too_small"
    assert cause_of(encoded(Image.new("RGB", (4000, 20)))) == "aspect_ratio"
    assert cause_of(encoded(Image.new("RGB", (20, 4000)))) == "aspect_ratio"
    assert decode(encoded(Image.new("RGB", (160, 20))), SETTINGS).size == (160, 20)
    assert (
        cause_of(encoded(Image.new("RGB", (101, 100))), ImageSettings(max_source_pixels=10_000))
        == "image_too_large"
    )


def test_a_decompression_bomb_is_refused_by_its_header_alone():
    """The header promises more pixels than memory holds and no pixel data follows: decoding would
    give another cause."""
    for side in (20_000, 60_000):
        data = bytearray(encoded(Image.new("RGB", (16, 16))))
        data[16:24] = side.to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        assert cause_of(bytes(data)) == "image_too_large"


SEEDS = [
    encoded(noise(16, 12), "PNG"),
    encoded(noise(16, 12), "JPEG"),
    encoded(noise(16, 12), "WEBP"),
    encoded(noise(16, 12), "GIF"),
    encoded(noise(16, 12), "TIFF"),
    encoded(half_transparent("RGBA"), "PNG"),
    encoded(noise(16, 12), "BMP"),
]


@hypothesis_settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=6)), max_size=4),
    st.integers(0, 2000),
)
def test_damaged_images_decode_or_raise_bad_row_and_nothing_else(data, damages, cut):
    damaged = bytearray(data[: max(1, len(data) - cut)] if cut < 50 else data)
    for place, bytes_ in damages:
        place %= len(damaged)
        damaged[place : place + len(bytes_)] = bytes_
    try:
        assert decode(bytes(damaged), SETTINGS).mode == "RGB"
    except BadRow:
        pass


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_random_bytes_raise_bad_row(data):
    with pytest.raises(BadRow):
        decode(data, SETTINGS)


SIZES = [
    ImageSettings(),
    ImageSettings(max_side=980, min_side=224, max_pixels=980 * 980),
    ImageSettings(max_side=32, min_side=32, max_pixels=1024),
    ImageSettings(max_side=64, min_side=16, max_pixels=2000),
    ImageSettings(max_side=100, min_side=10, max_pixels=1009 * 9),
]


@hypothesis_settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(SIZES),
    st.sampled_from([1, 4, 14, 16]),
    st.integers(8, 3000),
    st.floats(1, 8),
    st.booleans(),
)
def test_target_sizes_keep_the_bounds_and_the_aspect_ratio(
    settings, stride, shorter, ratio, upright
):
    longer = int(shorter * ratio)
    width, height = (shorter, longer) if upright else (longer, shorter)
    new_width, new_height = target_size(width, height, stride, settings)
    assert (
        new_width % stride == 0
        and new_height % stride == 0
        and min(new_width, new_height) >= stride
    )
    assert (
        max(new_width, new_height) <= settings.max_side
        and new_width * new_height <= settings.max_pixels
    )
    assert (new_width * new_height) // stride**2 <= largest_cell_count(stride, settings)
    # Each side is within one stride of a common scale of the source.
    lowest = max((new_width - stride) / width, (new_height - stride) / height)
    highest = min((new_width + stride) / width, (new_height + stride) / height)
    assert lowest <= highest + 1e-9


def test_small_images_grow_to_min_side_and_large_ones_shrink_and_fitting_ones_stay():
    settings = ImageSettings(max_side=1024, min_side=256, max_pixels=1024 * 1024)
    assert target_size(64, 48, 16, settings) == (336, 256)
    assert target_size(4000, 2000, 16, settings) == (1024, 512)
    assert target_size(640, 480, 16, settings) == (640, 480)
    assert target_size(800, 100, 16, settings) == (1024, 128)  # max_side goes before min_side
    image = noise(640, 480)
    assert resize(image, 16, settings) is image and resize(image, 14, settings).size == (644, 476)


@pytest.mark.parametrize("stride", [4, 7, 16])
@pytest.mark.parametrize("settings", SIZES[1:])
def test_the_largest_cell_count_is_reached_and_never_exceeded(settings, stride):
    seen = 0
    for shorter in {
        settings.min_side,
        *range(stride, settings.max_side + 1, stride),
        settings.max_side,
        3 * settings.max_side,
    }:
        for longer in {
            *range(
                shorter,
                min(8 * shorter, 4 * settings.max_side),
                1 if settings.max_side < 200 else stride,
            )
        }:
            width, height = target_size(longer, shorter, stride, settings)
            seen = max(seen, width * height // stride**2)
    assert seen == largest_cell_count(stride, settings)


def test_arrays_are_channels_first_from_minus_one_to_one():
    image = Image.new("RGB", (5, 3), (0, 255, 51))
    array = to_array(image)
    assert array.shape == (3, 3, 5) and array.dtype == np.float32 and array.flags.c_contiguous
    assert np.allclose(array[:, 0, 0], [-1, 1, -0.6])


@pytest.mark.parametrize(
    "values, key",
    [
        (dict(min_side=600, max_side=512), "min_side"),
        (dict(min_side=512, max_pixels=1000), "min_side"),
        (dict(max_aspect_ratio=0.5), "max_aspect_ratio"),
        (dict(min_source_side=500, max_source_pixels=1000), "min_source_side"),
    ],
)
def test_contradictory_settings_are_refused_by_name(values, key):
    with pytest.raises(SettingsError) as caught:
        build(ImageSettings, values, "data.latent_image")
    assert caught.value.key == f"data.latent_image.{key}"
