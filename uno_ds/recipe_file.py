"""Reads the file of a recipe and the recipes that it extends, as plain values."""

from pathlib import Path
from typing import Any

from uno_ds.files_on_disk import read_regular
from uno_ds.model.architecture import RECIPES
from uno_ds.settings import SettingsError, printable
from uno_ds.yaml_text import LONGEST, read_yaml

MOST_EXTENDED = 20


def read_tree(name_or_file: str, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The plain values of a recipe. With `extends: NAME_OR_FILE` at the top level, those of the
    named recipe are the defaults; a file is relative to the folder of the recipe that names it.
    extended_by: the files that led here, the first one first."""
    key = "extends" if extended_by else "--recipe"
    known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    if name_or_file in known:
        path = RECIPES / f"{name_or_file}.yaml"
    elif extended_by:
        path = extended_by[-1].parent / name_or_file
    else:
        path = Path(name_or_file)
    if len(extended_by) > MOST_EXTENDED:
        raise SettingsError(key, f"more than {MOST_EXTENDED} recipes extend one another.")
    try:
        tree = read_yaml(read_regular(path, LONGEST).decode("utf-8-sig"))
    except FileNotFoundError:
        raise SettingsError(
            key,
            f"'{printable(name_or_file)}' is neither a file nor one of {', '.join(known)}.",
        ) from None
    except OSError as error:
        raise SettingsError(key, f"{printable(path)} is not readable: {error.strerror}.") from None
    except ValueError as error:
        reason = printable(error, 400)
        raise SettingsError(key, f"{printable(path)} is not readable YAML: {reason}.") from None
    if not isinstance(tree, dict):
        raise SettingsError(key, f"{printable(path)} must hold a mapping of keys to values.")
    if any(path.samefile(file) for file in extended_by):
        raise SettingsError(key, f"{printable(path)} extends itself.")
    if "extends" in tree:
        below = tree.pop("extends")
        if not isinstance(below, str):
            raise SettingsError(
                "extends", f"must be the name or the file of a recipe, got {printable(below)}."
            )
        tree = merge(read_tree(below, (*extended_by, path)), tree)
    return tree


def merge(below: dict, above: dict) -> dict:
    """`below` updated with `above`, key by key; lists and scalars are replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged
