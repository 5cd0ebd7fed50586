"""The DeepSpeed configuration file that a recipe names."""

from pathlib import Path
from typing import Any

from uno_ds.files_on_disk import read_regular
from uno_ds.json_text import read_json
from uno_ds.settings import SettingsError, printable
from uno_ds.yaml_text import LONGEST

KEY = "engine.deepspeed"
DS_CONFIGS = Path(__file__).parent.parent.parent / "ds_configs"


def read_deepspeed_file(name_or_file: str) -> dict[str, Any]:
    """The content of a file, or of a name in ds_configs/, without its `"auto"` values, which leave
    the choice to the trainer; `zero_optimization.stage` is set. Raises SettingsError."""
    path = Path(name_or_file)
    if not path.suffix:
        path = DS_CONFIGS / f"{name_or_file}.json"
    shown = printable(path)
    try:
        config = read_json(read_regular(path, LONGEST))
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in DS_CONFIGS.glob("*.json")))
        message = f"{shown} does not exist; give a JSON file or one of {known}."
        raise SettingsError(KEY, message) from None
    except OSError as error:
        raise SettingsError(KEY, f"{shown} is not readable JSON: {error.strerror}.") from None
    except ValueError as error:
        raise SettingsError(KEY, f"{shown} is not readable JSON: {error}.") from None
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise SettingsError(
            KEY, f"{shown} must hold an object, and its zero_optimization, if there is one, too."
        )
    _check_numbers(config, shown)
    config = _without_auto(config)
    stage = config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise SettingsError(
            KEY,
            f"{shown}: zero_optimization.stage must be 0, 1, 2 or 3, got {printable(stage)}.",
        )
    return config


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """Without "auto" values, and without objects that contain nothing else."""
    plain = {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value != "auto"
    }
    return {key: value for key, value in plain.items() if value != {} or config[key] == {}}


def _check_numbers(config: dict[str, Any], file: str) -> None:
    """Raises SettingsError for numbers that json accepts and DeepSpeed's tensors do not: NaN,
    Infinity, 1e999 and integers beyond 64 bits."""
    for key, value in config.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                _check_numbers(item, file)
            elif isinstance(item, (int, float)) and not abs(item) < 2**63:
                shown = printable(item, 80)
                raise SettingsError(
                    KEY,
                    f"{file}: {printable(key)} must be finite and below 2^63, got {shown}.",
                )
