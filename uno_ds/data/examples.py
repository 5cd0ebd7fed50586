"""What an example of a data row is made of: texts and pictures, from pixels or prepared.

Each layout adds its own class of examples (data/layouts).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from uno_ds.sequence.composition import Encoded


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image of a prepared source: its latents, its regression targets, and its resized picture
    where it may be a condition of the visual encoder. None: what the recipe of the preparation had
    no use for."""

    latent: Encoded | None
    target: Encoded | None
    picture: Image.Image | None


# Token ids and PreparedImage are those of a prepared source.
Text = str | list[int]
Picture = Image.Image | PreparedImage
# Turns a value of an image column, or an image of a prepared row, into a picture. Raises BadRow.
Load = Callable[[Any], Picture]


@dataclass(frozen=True)
class Example:
    """A row of a source after random choices among its content. `key` names the row in logs."""

    key: str
