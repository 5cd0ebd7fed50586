"""Another image encoder to compare with: a folder of `transformers`, such as DINOv2."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from uno_ds.data.files import one_line
from uno_ds.inspection.collection import Record, summary_of
from uno_ds.settings import SettingsError

# Of ImageNet, which DINOv2 and most others were trained with.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEFAULT_SIDE = 224


class Encoder:
    """Features of the patches of square pictures. Reads files of the folder alone and runs no code
    of it. Raises SettingsError under `--encoder`."""

    def __init__(self, folder: Path, device: torch.device):
        check_encoder(folder)
        from transformers import AutoModel

        try:
            self.model: Any = AutoModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise SettingsError("--encoder", f"'{folder}': {one_line(error)}") from None
        # CLIP and SigLIP have a vision tower.
        self.model = getattr(self.model, "vision_model", self.model).to(device).eval()
        config = getattr(self.model.config, "vision_config", self.model.config)
        patch = getattr(config, "patch_size", None)
        if not isinstance(patch, int):
            raise SettingsError(
                "--encoder", f"'{folder}' has no patch_size: it is no image encoder."
            )
        self.patch = patch
        self.device = device
        self.mean, self.deviation, side = _preprocessing(folder)
        self.side = max(1, side // self.patch) * self.patch

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image], scenes: Sequence[Any]) -> Record:
        """pooled [n, W] and spatial [n, 4] of the patches' features, as for the model's own
        encoder. `scenes`: ground truth of the pictures, None where there is none."""
        pixels = torch.stack([self._pixels(picture) for picture in pictures]).to(self.device)
        tokens_nTW = self.model(pixel_values=pixels).last_hidden_state.float()
        patches = (self.side // self.patch) ** 2
        # Class and register tokens come first.
        grids = [(self.side // self.patch,) * 2] * len(pictures)
        patches_nTW = list(tokens_nTW[:, -patches:])
        return summary_of(patches_nTW, grids, scenes), {}  # type: ignore[arg-type]

    def _pixels(self, picture: Image.Image) -> torch.Tensor:
        resized = picture.resize((self.side, self.side), Image.Resampling.BICUBIC)
        values = (np.asarray(resized, dtype=np.float32) / 255 - self.mean) / self.deviation
        return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)


def check_encoder(folder: Path) -> None:
    """Raises SettingsError unless the folder looks like a model's; reads no weights."""
    if not (folder / "config.json").is_file():
        raise SettingsError("--encoder", f"'{folder}' is no folder with a config.json.")


def _preprocessing(folder: Path) -> tuple[Any, Any, int]:
    """(mean, deviation, side) of preprocessor_config.json, where there is one."""
    path = folder / "preprocessor_config.json"
    content: dict[str, Any] = {}
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SettingsError("--encoder", f"'{path}' is no JSON: {one_line(error)}") from None
    size = content.get("crop_size") or content.get("size") or {}
    side = size.get("height") or size.get("shortest_edge") if isinstance(size, dict) else size
    return (
        content.get("image_mean") or MEAN,
        content.get("image_std") or DEVIATION,
        int(side or DEFAULT_SIDE),
    )
