"""Data sets of the Hugging Face hub: `hf://datasets/ORG/NAME[@REVISION][/FOLDER or glob]` as a
folder of the hub's cache on this machine."""

import re
from dataclasses import dataclass
from pathlib import Path

from uno_ds.settings import SettingsError, printable

SCHEME = "hf://"
_ADDRESS = re.compile(
    r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<inside>.+))?"
)


@dataclass(frozen=True)
class Address:
    """`name`: ORG/NAME; `inside`: a folder, file or glob."""

    name: str
    revision: str | None
    inside: str | None

    def has(self, path: str) -> bool:
        """Whether the path of a file is one of this data set."""
        start = f"{SCHEME}datasets/{self.name}"
        return path.startswith((f"{start}/", f"{start}@"))


def is_hub_path(path: str) -> bool:
    return path.startswith(SCHEME)


def read_address(path: str) -> Address:
    """Raises SettingsError (key "path")."""
    found = _ADDRESS.fullmatch(path)
    if found is None:
        raise SettingsError(
            "path",
            f"'{printable(path)}' must be hf://datasets/ORG/NAME, with @REVISION and /FOLDER after "
            "it if need be.",
        )
    return Address(found["name"], found["revision"], found["inside"])


def local_path(path: str) -> str:
    """The folder, file or glob in the snapshot of the data set, whose files are fetched unless they
    are in the cache. Raises SettingsError (key "path")."""
    address = read_address(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    inside = address.inside
    patterns = None if inside is None else [inside, f"{inside.rstrip('/')}/**"]
    try:
        folder = snapshot_download(
            address.name,
            repo_type="dataset",
            revision=address.revision,
            allow_patterns=patterns,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = printable(" ".join(str(error).split()), 300)
        raise SettingsError(
            "path", f"'{printable(path)}' cannot be fetched from the hub: {reason}"
        ) from None
    return folder if inside is None else str(Path(folder) / inside)
