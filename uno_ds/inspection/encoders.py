"""Another image encoder to compare with: a folder of `transformers`, such as DINOv2."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from uno_ds.inspection.collection import Record, summary_of
from uno_ds.model.vision_folder import FolderEncoder, read_vision_folder
from uno_ds.settings import SettingsError

KEY = "--encoder"


class Encoder:
    """Features of the patches of square pictures. Reads files of the folder alone and runs no code
    of it. Raises SettingsError under `--encoder`."""

    def __init__(self, folder: Path, device: torch.device):
        self.folder = read_vision_folder(folder, KEY)
        self.encoder = FolderEncoder(self.folder, device, torch.float32, KEY)
        self.device = device
        self.side = max(1, self.folder.side // self.folder.patch) * self.folder.patch

    def features(self, pictures: Sequence[Image.Image], scenes: Sequence[Any]) -> Record:
        """pooled [n, W] and spatial [n, 4] of the patches' features, as for the model's own
        encoder. `scenes`: ground truth of the pictures, None where there is none."""
        pixels = torch.stack([self._pixels(picture) for picture in pictures]).to(self.device)
        tokens_nTW = self.encoder.tokens(pixels).float()
        across = self.side // self.folder.patch
        # Class and register tokens come first.
        grids = [(across, across)] * len(pictures)
        return summary_of(list(tokens_nTW[:, -(across**2) :]), grids, scenes), {}

    def _pixels(self, picture: Image.Image) -> torch.Tensor:
        resized = picture.resize((self.side, self.side), Image.Resampling.BICUBIC)
        values = np.asarray(resized, dtype=np.float32) / 255
        values = (values - self.folder.mean) / self.folder.deviation
        return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)


def check_encoder(folder: Path) -> None:
    """Raises SettingsError unless the folder looks like a model's; reads no weights."""
    if not (folder / "config.json").is_file():
        raise SettingsError(KEY, f"'{folder}' is no folder with a config.json.")
