"""The encoded bytes of an image, from a value of an image column."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uno_ds.data.files import is_inside, one_line
from uno_ds.data.images import BadRow
from uno_ds.files_on_disk import read_regular


def image_bytes(value: Any, folder: Path | None) -> bytes:
    """The encoded bytes of an image column: bytes, a {bytes, path} struct, or the name of a file
    below `folder`."""
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if not isinstance(value, str) or not value.strip():
        raise BadRow("missing_image", f"no image, but {value!r:.60}")
    if folder is None:
        raise BadRow(
            "missing_image", f"'{value:.200}' is a file name and the source has no folder of images"
        )
    try:
        path = _file_of(value, folder).resolve()
        if not is_inside(path, folder):
            raise BadRow("missing_image", f"'{value:.200}' is outside of the folder of images")
        return read_regular(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadRow("missing_image", f"'{value:.200}': {one_line(error)}") from None


def _file_of(name: str, folder: Path) -> Path:
    """`name` below `folder`; where no such file exists and `name` begins with the folder's own
    name, without that part."""
    path, parts = folder / name, Path(name).parts
    repeated = len(parts) > 1 and parts[0] == folder.absolute().name
    return folder.joinpath(*parts[1:]) if repeated and not path.exists() else path
