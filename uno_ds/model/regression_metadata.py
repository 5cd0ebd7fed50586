"""What the tensors of `uno.safetensors` do not say of the regression they were trained by: kept in
the file's metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from uno_ds.json_text import read_json
from uno_ds.model.tensor_file import TensorFile
from uno_ds.model.weights import EXTRA_FILE
from uno_ds.settings import SettingsError

KEY = "regression"
# One grid of metaqueries and a target of the model's own encoder.
NO_IDENTITY: Mapping[str, Any] = MappingProxyType({})


def extra_metadata(identity: Mapping[str, Any]) -> dict[str, str]:
    """Of the file, for an identity of training/regression_identity."""
    return {"format": "pt"} | ({KEY: json.dumps(dict(identity))} if identity else {})


def identity_in(folder: Path) -> dict[str, Any]:
    """Of the metaqueries in a folder; empty for one grid and a target of the model's own encoder,
    and where there are no metaqueries. Raises SettingsError."""
    path = folder / EXTRA_FILE
    if not path.exists():
        return {}
    text = TensorFile(path).metadata.get(KEY, "{}")
    try:
        identity = read_json(text.encode())
    except ValueError:
        identity = None
    if not isinstance(identity, dict):
        raise SettingsError(str(path), f"its metadata {KEY} holds no object.")
    return identity
