"""Data sets of the Hugging Face hub: `hf://datasets/ORG/NAME[@REVISION][/FOLDER or glob]` as a
folder of the hub's cache on this machine."""

import re
from pathlib import Path

from uno_ds.settings import SettingsError, printable

SCHEME = "hf://"
_ADDRESS = re.compile(
    r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<inside>.+))?"
)


def is_hub_path(path: str) -> bool:
    return path.startswith(SCHEME)


def local_path(path: str) -> str:
    """The folder, file or glob in the snapshot of the data set, whose files are fetched unless they
    are in the cache. Raises SettingsError (key "path")."""
    found = _ADDRESS.fullmatch(path)
    if found is None:
        raise SettingsError(
            "path",
            f"'{printable(path)}' must be hf://datasets/ORG/NAME, with @REVISION and /FOLDER after "
            "it if need be.",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    inside = found["inside"]
    patterns = None if inside is None else [inside, f"{inside.rstrip('/')}/**"]
    try:
        folder = snapshot_download(
            found["name"],
            repo_type="dataset",
            revision=found["revision"],
            allow_patterns=patterns,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = printable(" ".join(str(error).split()), 300)
        raise SettingsError(
            "path", f"'{printable(path)}' cannot be fetched from the hub: {reason}"
        ) from None
    return folder if inside is None else str(Path(folder) / inside)
