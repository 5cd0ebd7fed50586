"""CLIP models of local folders, by transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from uno_ds.settings import SettingsError


class Clip:
    """A CLIP model of a folder in the format of transformers. Raises SettingsError if it is none.

    torchmetrics 1.9 has a CLIPScore, but expects of the model what transformers 5 no longer
    returns; the formula is one line."""

    def __init__(self, folder: Path, device: torch.device):
        from transformers import AutoProcessor, CLIPModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        check_folder(folder, "--clip", "a CLIP model, as openai/clip-vit-large-patch14")
        try:
            model: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
            self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise unusable_folder(folder, "--clip", error) from None
        self._model = model.to(device).eval()
        self._device = device
        self._longest = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """[B, C]: directions of images."""
        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        found = self._model.get_image_features(pixel_values=pixels.to(self._device))
        return _directions(found)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """[B, C]: directions of texts, of their first 77 tokens."""
        inputs = self._processor(
            text=list(texts),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self._longest,
        )
        found = self._model.get_text_features(
            input_ids=inputs["input_ids"].to(self._device),
            attention_mask=inputs["attention_mask"].to(self._device),
        )
        return _directions(found)

    def score(self, image: Image.Image, text: str) -> float:
        """100 times the cosine of an image and a text, at least 0."""
        cosine = (self.images([image]) * self.texts([text])).sum()
        return max(0.0, 100.0 * float(cosine))


def check_folder(folder: Path | None, flag: str, what: str) -> None:
    """Raises SettingsError if the folder of a model is not given or none."""
    if folder is None:
        raise SettingsError(flag, f"is required: the local folder of {what}.")
    if not (folder / "config.json").is_file():
        message = f"{folder} holds no config.json; give the local folder of {what}."
        raise SettingsError(flag, message)


def unusable_folder(folder: Path, flag: str, error: Exception) -> SettingsError:
    reason = " ".join(str(error).split())
    return SettingsError(flag, f"{folder} cannot be loaded by transformers: {reason}.")


def _directions(features: object) -> torch.Tensor:
    """Features divided by their norms; transformers 5 returns them in an output object."""
    values = getattr(features, "pooler_output", features)
    assert isinstance(values, torch.Tensor), "pooled features"
    return torch.nn.functional.normalize(values.float(), dim=-1)
