"""What the frozen encoders make of a row, exactly as training computes it, without the rest of the model."""

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from uno_ds.data.images import BadRow, resize, to_array
from uno_ds.data.prepared import bad, png_bytes, tensor_bytes
from uno_ds.data.rows import Conversation, EditSequence, TextToImage
from uno_ds.data.text import Tokenizer
from uno_ds.model.architecture import Architecture
from uno_ds.model.codec import Codec
from uno_ds.model.flux import FLUX_FILE
from uno_ds.model.tensor_file import digest_of
from uno_ds.model.vision import Connector, VisionEncoder, one_thread
from uno_ds.model.weights import WeightsFile, bagel_name
from uno_ds.objectives.visual_regression import grid_targets
from uno_ds.sequence.composition import SpecialTokens
from uno_ds.sequence.packing import Collator
from uno_ds.sequence.segments import Kind, Sample, Segment
from uno_ds.settings import SettingsError, to_plain

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe

SHAPE_OF_LATENTS = ("codec", "codec_downsample", "latent_channels", "latent_patch")


class TargetEncoder(nn.Module):
    """The visual encoder and, for targets of kind "connector", the connector of a base: a few per cent of its weights.
    Without weights until `load`."""

    def __init__(self, shape: Architecture, target: str):
        super().__init__()
        with torch.device("meta"):
            self.vit = VisionEncoder(shape)
            self.connector = Connector(shape) if target == "connector" else None

    def load(self, weights: WeightsFile) -> "TargetEncoder":
        self.to_empty(device="cpu").requires_grad_(False)
        for name, parameter in self.named_parameters():
            parameter.copy_(weights.read(bagel_name(name)))
        return self

    def digest(self, weights: WeightsFile) -> str:
        """Of this encoder's weights as they are on the disk."""
        names = sorted(bagel_name(name) for name, _ in self.named_parameters())
        return hashlib.sha256(
            repr([(name, weights.digest(name)) for name in names]).encode()
        ).hexdigest()[:16]


def wants_targets(recipe: "Recipe", layout: str) -> bool:
    return (
        layout != "vlm"
        and recipe.objective.regression_weight > 0
        and recipe.sequence.metaquery_grid > 0
    )


def encoding_of(recipe: "Recipe", tokenizer: Tokenizer, layout: str) -> dict[str, Any]:
    """Everything that decides what a prepared row of a source of this layout holds, by recipe key; None: of no use to the
    recipe. Weights and the tokenizer are named by a digest. Raises SettingsError if the recipe's targets cannot be prepared."""
    shape, targets = recipe.architecture, wants_targets(recipe, layout)
    if targets and recipe.model.train == "all":
        raise SettingsError(
            "model.train",
            "is all, so the visual encoder moves and its regression targets cannot be prepared; set it to generation, or "
            "objective.regression_weight to 0.",
        )
    if targets and recipe.base is None:
        raise SettingsError(
            "model.base",
            "is null, so the visual encoder has no weights from which regression targets could be prepared; give a base, or "
            "set objective.regression_weight to 0.",
        )
    sizes = {"latent_image": recipe.data.latent_image}
    keys: dict[str, Any] = {}
    if targets or layout != "t2i":
        sizes["vit_image"] = recipe.data.vit_image
        keys["model.architecture.vit_patch"] = shape.vit_patch
    keys |= {
        f"data.{name}.{key}": value
        for name, settings in sizes.items()
        for key, value in to_plain(settings).items()
    }
    keys |= {f"model.architecture.{name}": getattr(shape, name) for name in SHAPE_OF_LATENTS}
    keys["model.tokenizer"] = tokenizer.digest()
    if shape.codec == "flux":
        keys |= {
            "model.base (codec)": digest_of(recipe.base / FLUX_FILE),
            "model.codec_precision": recipe.model.codec_precision,
        }
    if targets:
        target = recipe.objective.regression_target
        keys |= {
            "objective.regression_target": target,
            "sequence.metaquery_grid": recipe.sequence.metaquery_grid,
            "model.architecture.vit_heads": shape.vit_heads,
            "model.base (visual encoder)": TargetEncoder(shape, target).digest(
                WeightsFile(recipe.base)
            ),
        }
    keys["sequence.conversation_images"] = (
        recipe.sequence.conversation_images if layout == "vlm" else None
    )
    return keys


class RowEncoder:
    """Turns rows of a source into rows of a prepared one. `targets`: the loaded encoder where metaqueries ask for it."""

    def __init__(
        self,
        recipe: "Recipe",
        tokenizer: Tokenizer,
        codec: Codec,
        targets: TargetEncoder | None,
        device: torch.device,
        dtype: str,
    ):
        self.recipe, self.tokenizer, self.codec, self.device, self.dtype = (
            recipe,
            tokenizer,
            codec,
            device,
            dtype,
        )
        self.targets = targets.to(device) if targets is not None else None
        self.geometry = recipe.architecture.geometry
        # For a metaquery alone: which expert trains does not matter, and no special token stands in it.
        self._collate = Collator(
            self.geometry,
            SpecialTokens(0, 0, 0, 0),
            train_understanding=True,
            stop_at_context=False,
        )

    def __call__(self, row: TextToImage | EditSequence | Conversation | BadRow) -> dict[str, Any]:
        if isinstance(row, BadRow):
            return bad(row)
        if isinstance(row, TextToImage):
            return {
                "image": self._image(row.image, latent=True, target=True),
                "captions": self._ids(row.captions),
            }
        if isinstance(row, EditSequence):
            sources = set(row.pairs)
            images = [
                self._image(
                    image, latent=True, target=number - 1 in sources, picture=number in sources
                )
                for number, image in enumerate(row.images)
            ]
            return {
                "images": images,
                "instructions": [*map(self._ids, row.instructions)],
                "captions": [*map(self._ids, row.captions)],
            }
        shown = self.recipe.sequence.conversation_images
        views = {"latent": shown != "vit", "picture": shown != "latents"}
        return {
            "turns": [
                {
                    "role": role,
                    "parts": [
                        {"ids": self.tokenizer.encode(part)}
                        if isinstance(part, str)
                        else {"image": self._image(part, **views)}
                        for part in parts
                    ],
                }
                for role, parts in row.turns
            ]
        }

    @torch.no_grad()
    def latent(self, pixels: np.ndarray) -> torch.Tensor:
        """[c, h / downsample, w / downsample] of pixels [3, h, w]."""
        with one_thread():
            return self.codec.encode(torch.from_numpy(pixels)[None].to(self.device))[0]

    @torch.no_grad()
    def target(self, pixels: np.ndarray) -> torch.Tensor:
        """[g * g, W]: the regression targets of the image whose view for the visual encoder is `pixels`."""
        side, grid = self.recipe.sequence.metaquery_grid, _grid(pixels, self.geometry.vit_stride)
        segment = Segment(
            Kind.METAQUERY,
            np.zeros(side**2, dtype=np.int64),
            pixels=pixels,
            grid=grid,
            side=side,
            supervises=0,
        )
        batch = self._collate([Sample("", [segment])]).to(self.device)
        features_PW = self.targets.vit(
            batch.vision.patches_PC,
            batch.vision.positions_P,
            batch.vision.plan,
            batch.vision.lengths,
        )
        if self.targets.connector is not None:
            features_PW = self.targets.connector(features_PW, batch.vision.lengths)
        return grid_targets(features_PW, batch.targets)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [self.tokenizer.encode(text) for text in texts]

    def _image(
        self,
        image: Image.Image | BadRow | None,
        latent: bool = False,
        target: bool = False,
        picture: bool = False,
    ) -> dict[str, Any] | None:
        """The asked-for parts of one image. None: an image that no pair of its row shows."""
        if image is None or isinstance(image, BadRow):
            return bad(image) if image is not None else None
        stored: dict[str, Any] = {}
        if latent:
            pixels = to_array(
                resize(image, self.geometry.latent_stride, self.recipe.data.latent_image)
            )
            values = self.latent(pixels)
            stored |= {
                "latent": tensor_bytes(values, self.dtype),
                "latent_shape": list(values.shape),
                "latent_grid": _grid(pixels, self.geometry.latent_stride),
            }
        if picture or target and self.targets is not None:
            resized = resize(image, self.geometry.vit_stride, self.recipe.data.vit_image)
            if picture:
                stored["picture"] = png_bytes(resized)
            if target and self.targets is not None:
                pixels = to_array(resized)
                stored |= {
                    "target": tensor_bytes(self.target(pixels), self.dtype),
                    "target_grid": _grid(pixels, self.geometry.vit_stride),
                }
        return stored


def _grid(pixels: np.ndarray, stride: int) -> tuple[int, int]:
    return pixels.shape[1] // stride, pixels.shape[2] // stride
