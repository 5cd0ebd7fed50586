"""Files of pictures, and what is written into them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def metadata(path: Path) -> dict[str, Any]:
    """What sampling wrote into a PNG file."""
    return json.loads(Image.open(path).text["uno_ds"])
