"""A vision model of `transformers` in a folder, such as DINOv2: frozen, whole on every rank, and no
part of the model that trains. Files of the folder are read, and none of its code is run.

Shape suffixes: docs/notation.md."""

import hashlib
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from uno_ds.data.files import one_line
from uno_ds.json_text import read_json
from uno_ds.model.tensor_file import digest_of
from uno_ds.model.vision import one_thread
from uno_ds.settings import SettingsError, printable

# Of ImageNet, which DINOv2 and most others were trained with.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEFAULT_SIDE = 224


@dataclass(frozen=True)
class VisionFolder:
    """What the configuration files say. patch: pixels per side of a patch; width: of a feature;
    mean, deviation: of the colours, from 0 to 1; side: pixels per side of the images that it was
    trained with."""

    path: Path
    patch: int
    width: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    side: int

    def digest(self) -> str:
        """Of configuration and weights as they are on the disk."""
        files = [*self.path.glob("*.safetensors"), *self.path.glob("*config.json")]
        found = [(file.name, digest_of(file)) for file in sorted(files)]
        return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def read_vision_folder(folder: str | Path, key: str) -> VisionFolder:
    """Reads no weights. Raises SettingsError under `key`."""
    path = Path(folder).expanduser()
    config = _config(path, key)
    patch, width = getattr(config, "patch_size", None), getattr(config, "hidden_size", None)
    if not isinstance(patch, int) or not isinstance(width, int):
        lacking = "hidden_size" if isinstance(patch, int) else "patch_size"
        raise SettingsError(key, f"'{path}' has no {lacking}: it is no image encoder.")
    return VisionFolder(path, patch, width, *_preprocessing(path, key))


class FolderEncoder:
    """Features of the patches of images by the model in a folder. Raises SettingsError under `key`
    for a folder without weights, and for a model that does not give a row for each patch."""

    def __init__(self, folder: VisionFolder, device: torch.device, dtype: torch.dtype, key: str):
        from transformers import AutoModel

        self.folder = folder
        try:
            model: Any = AutoModel.from_pretrained(
                folder.path, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
        except Exception as error:  # whatever the library raises for files of others
            raise SettingsError(key, f"'{folder.path}': {one_line(error)}") from None
        self.model = _vision_part(model).to(device=device, dtype=dtype).eval().requires_grad_(False)
        self._options = _options(self.model)
        # On the device: an upload in every step would wait for it.
        self._colours = [
            torch.tensor(values, dtype=torch.float64, device=device)[:, None, None]
            for values in (folder.mean, folder.deviation)
        ]
        side = 2 * folder.patch
        try:
            tokens = self.tokens(torch.zeros(1, 3, side, side, device=device, dtype=dtype))
        except (ValueError, RuntimeError, TypeError) as error:
            message = f"'{folder.path}' cannot encode an image of 2 x 2 patches: {one_line(error)}"
            raise SettingsError(key, message) from None
        if tokens.dim() != 3 or tokens.shape[1] < 4 or tokens.shape[2] != folder.width:
            raise SettingsError(
                key,
                f"'{folder.path}' gives features of shape {list(tokens.shape)} for an image of 2 x "
                "2 patches; a row for each patch is needed.",
            )

    @torch.no_grad()
    def tokens(self, pixels_B3hw: torch.Tensor) -> torch.Tensor:
        """[B, T, W]: class and register tokens, if there are any, then a row for each patch.
        `pixels_B3hw`: as the model wants them."""
        return self.model(pixel_values=pixels_B3hw, **self._options).last_hidden_state

    @torch.no_grad()
    def features(
        self, images: Sequence[torch.Tensor], grids: Sequence[tuple[int, int]]
    ) -> torch.Tensor:
        """[P, W]: features of images [3, h, w] in [-1, 1], each resized so that its patches form
        its grid (rows, columns). Image by image and, on a CPU, on one thread: an image's features
        do not depend on the others (see model/vision)."""
        parameter = next(self.model.parameters())
        found = [parameter.new_zeros(0, self.folder.width)]
        with one_thread():
            for image, (rows, columns) in zip(images, grids, strict=True):
                pixels_13hw = self._pixels(image, rows, columns).to(parameter.dtype)
                found.append(self.tokens(pixels_13hw)[0, -rows * columns :])
        return torch.cat(found)

    def _pixels(self, image_3hw: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        pixels = image_3hw[None].to(torch.promote_types(image_3hw.dtype, torch.float32))
        size = rows * self.folder.patch, columns * self.folder.patch
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1, 1)
        mean, deviation = (values.to(pixels.dtype) for values in self._colours)
        return ((pixels + 1) / 2 - mean) / deviation


@lru_cache
def vision_flops(path: Path, rows: int, columns: int) -> int:
    """Operations of the features of one image of rows x columns patches, as torch counts them; no
    weights are read."""
    from torch.utils.flop_counter import FlopCounterMode

    model = _empty_model(path)
    patch = _config(path, str(path)).patch_size
    pixels = torch.empty(1, 3, rows * patch, columns * patch, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixel_values=pixels, **_options(model))
    return counter.get_total_flops()


@lru_cache
def vision_parameters(path: Path) -> int:
    """Number of weights, by the configuration."""
    return sum(parameter.numel() for parameter in _empty_model(path).parameters())


def _empty_model(path: Path) -> Any:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return _vision_part(AutoModel.from_config(config))


def _vision_part(model: Any) -> Any:
    """CLIP and SigLIP have a vision tower."""
    return getattr(model, "vision_model", model)


def _options(model: Any) -> dict[str, Any]:
    """Models with a fixed image size interpolate their positions only where they are told to."""
    accepted = inspect.signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}


def _config(path: Path, key: str) -> Any:
    if not (path / "config.json").is_file():
        raise SettingsError(key, f"'{path}' is no folder with a config.json.")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the library raises for files of others
        raise SettingsError(key, f"'{path}': {one_line(error)}") from None
    return getattr(config, "vision_config", config)


def _preprocessing(path: Path, key: str) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """(mean, deviation, side) of preprocessor_config.json, where there is one."""
    file = path / "preprocessor_config.json"
    content: Any = {}
    if file.is_file():
        try:
            content = read_json(file.read_bytes())
        except ValueError as error:
            raise SettingsError(key, f"'{file}' is no JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise SettingsError(key, f"'{file}' holds no object.")
    size = content.get("crop_size") or content.get("size") or {}
    side = size.get("height") or size.get("shortest_edge") if isinstance(size, dict) else size
    mean = content.get("image_mean") or MEAN
    deviation = content.get("image_std") or DEVIATION
    if not _is_colour(mean) or not _is_colour(deviation) or 0 in deviation:
        raise SettingsError(
            key,
            f"'{file}': image_mean and image_std must be three numbers each, got "
            f"{printable(mean)} and {printable(deviation)}.",
        )
    return tuple(mean), tuple(deviation), side if type(side) is int and side > 0 else DEFAULT_SIDE


def _is_colour(values: Any) -> bool:
    if not isinstance(values, list | tuple) or len(values) != 3:
        return False
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)
