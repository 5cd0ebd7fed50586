"""The encoded bytes of an image, from a value of an image column."""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from uno_ds.data.files import is_inside, one_line
from uno_ds.data.images import BadRow
from uno_ds.files_on_disk import read_regular

_ADDRESS = re.compile(r"(https?|s3|gs|ftp|hf)://", re.IGNORECASE)
_FILE_ADDRESS = "file://"
# Text of this length and more is no file name: Linux has none above 4,096 characters.
LONGEST_NAME = 4_096
# How encoded images begin in base64 (JPEG, PNG, GIF, WebP, BMP, TIFF, AVIF).
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkqA", "TU0AK", "AAAA")
_SHORTEST_BASE64 = 64


def image_bytes(value: Any, folders: Sequence[Path], prefix: str = "") -> bytes:
    """The encoded bytes of an image: bytes, a {bytes, path} struct, base64 text or a data URI, or
    the name of a file in one of `folders`. `prefix` is taken off names that begin with it. Raises
    BadRow."""
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if not isinstance(value, str) or not value.strip():
        raise BadRow("missing_image", f"no image, but {value!r:.60}")
    if value.startswith("data:"):
        return _of_data_uri(value)
    if _looks_like_base64(value):
        return _of_base64(value)
    if _ADDRESS.match(value):
        raise BadRow("missing_image", f"'{value:.200}' is an address; download the images first")
    if not folders:
        raise BadRow(
            "missing_image", f"'{value:.200}' is a file name and the source has no folder of images"
        )
    try:
        path = file_of(value, folders, prefix)
        if path is None:
            raise BadRow("missing_image", f"'{value:.200}' is outside of the folder of images")
        return read_regular(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadRow("missing_image", f"'{value:.200}': {one_line(error)}") from None


def file_of(name: str, folders: Sequence[Path], prefix: str = "") -> Path | None:
    """The file `name` in the first of the folders that has it, or beside a folder where the name
    begins with the folder's own; a path that does not exist if none has it, and None if it would be
    outside of them. Raises OSError or ValueError."""
    name = name.removeprefix(_FILE_ADDRESS)
    if prefix:
        name = name.removeprefix(prefix)
    inside = []
    for folder in folders:
        path = _below(name, folder).resolve()
        if is_inside(path, folder):
            inside.append(path)
            if path.exists():
                return path
    return inside[0] if inside else None


def foreign_prefix(name: str, folders: Sequence[Path]) -> str:
    """The beginning of a file name that has to be taken off for the file to be found in one of the
    folders: names often begin with folders of the machine on which they were written. "" where the
    name is found as it is, or in no way."""
    if _looks_like_base64(name) or name.startswith("data:") or _ADDRESS.match(name):
        return ""
    try:
        found = file_of(name, folders)
        if found is not None and found.exists():
            return ""
        bare = name.removeprefix(_FILE_ADDRESS)
        parts = PurePosixPath(bare).parts
        if ".." in parts:
            return ""
        for number in range(1, len(parts)):
            rest = str(PurePosixPath(*parts[number:]))
            found = file_of(rest, folders)
            if found is not None and found.exists() and bare.endswith(rest):
                return bare.removesuffix(rest)
    except (OSError, ValueError):
        pass
    return ""


def _below(name: str, folder: Path) -> Path:
    """`name` below `folder`; where no such file exists and `name` begins with the folder's own
    name, without that part."""
    path, parts = folder / name, Path(name).parts
    repeated = len(parts) > 1 and parts[0] == folder.absolute().name
    return folder.joinpath(*parts[1:]) if repeated and not path.exists() else path


def _looks_like_base64(value: str) -> bool:
    """Names of files of that length have a dot, which base64 never has."""
    if len(value) > LONGEST_NAME:
        return True
    begins = value.lstrip().startswith(_BASE64_STARTS)
    return begins and len(value) >= _SHORTEST_BASE64 and "." not in value


def _of_data_uri(value: str) -> bytes:
    head, comma, data = value.partition(",")
    if not comma or not head.endswith(";base64"):
        raise BadRow("bad_base64", f"a data URI must be 'data:TYPE;base64,...', got '{value:.60}'")
    return _of_base64(data)


def _of_base64(text: str) -> bytes:
    """Of the usual alphabet or of the one of addresses; line breaks are left out."""
    plain = "".join(text.split()).replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRow("bad_base64", one_line(error)) from None
