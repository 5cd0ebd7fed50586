"""Encodes rows with the frozen encoders, to the bits that training computes, without the rest of
the model. Shape suffixes: docs/notation.md."""

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from uno_ds.data.examples import Picture, Text
from uno_ds.data.images import BadRow, ImageSettings, resize, to_array
from uno_ds.data.layouts import LAYOUTS, get_layout
from uno_ds.data.prepared import bad, png_bytes, tensor_bytes
from uno_ds.data.text import Tokenizer
from uno_ds.model.architecture import Architecture
from uno_ds.model.codec import Codec, get_codec
from uno_ds.model.tensor_file import digest_of
from uno_ds.model.vision import Connector, VisionEncoder, one_thread
from uno_ds.model.vision_folder import FolderEncoder
from uno_ds.model.weights import WeightsFile, bagel_name
from uno_ds.objectives.regression_target import (
    feature_rows,
    get_regression_target,
    target_source,
    vision_folder_of,
)
from uno_ds.objectives.visual_regression import regression_targets
from uno_ds.sequence.batch import VisionRows
from uno_ds.sequence.composition import SpecialTokens
from uno_ds.sequence.packing import Collator
from uno_ds.sequence.segments import Kind, Sample, Segment
from uno_ds.settings import SettingsError, to_plain

if TYPE_CHECKING:
    from uno_ds.recipe import Recipe

SHAPE_OF_LATENTS = ("codec", "codec_downsample", "latent_channels", "latent_patch")


class TargetEncoder(nn.Module):
    """What computes regression targets: the visual encoder of a base and, where the target needs
    it, the connector; a few per cent of the base's weights. Without weights until `load`. `target`:
    a name in REGRESSION_TARGETS; raises ValueError for another one."""

    def __init__(self, shape: Architecture, target: str):
        super().__init__()
        self.target = get_regression_target(target)
        with torch.device("meta"):
            self.vit = VisionEncoder(shape)
            self.connector = Connector(shape) if self.target.uses_connector else None

    def forward(self, vision: VisionRows) -> torch.Tensor:
        """[P, W]: the features of all images, of which targets are means over grid cells."""
        return self.target.features(self.vit_features(vision), self.connector, vision.lengths)

    def vit_features(self, vision: VisionRows) -> torch.Tensor:
        """[P, W]: of the visual encoder."""
        features_PW: torch.Tensor = self.vit(
            vision.patches_PC, vision.positions_P, vision.plan, vision.lengths
        )
        return features_PW

    def load(self, weights: WeightsFile) -> "TargetEncoder":
        self.to_empty(device="cpu").requires_grad_(False)
        for name, parameter in self.named_parameters():
            parameter.copy_(weights.read(bagel_name(name)))
        return self

    def digest(self, weights: WeightsFile) -> str:
        """Of this encoder's weights as they are on the disk."""
        names = sorted(bagel_name(name) for name, _ in self.named_parameters())
        digests = [(name, weights.digest(name)) for name in names]
        return hashlib.sha256(repr(digests).encode()).hexdigest()[:16]


def wants_targets(recipe: "Recipe", layout: str) -> bool:
    """Whether preparation encodes regression targets for a source of this layout."""
    return get_layout(layout).generates_images and recipe.regresses


def encoding_of(recipe: "Recipe", tokenizer: Tokenizer, layout: str) -> dict[str, Any]:
    """Everything that decides what a prepared row of a source of this layout holds, by recipe key;
    None: a key that the layout does not read. Weights and the tokenizer are named by a digest.
    Raises SettingsError if the recipe's targets cannot be prepared."""
    shape, objective = recipe.architecture, recipe.objective
    target = get_regression_target(objective.regression_target)
    targets = wants_targets(recipe, layout)
    if targets and target.reads_vision:
        _check_targets(recipe)
    reads_vit_images = targets or get_layout(layout).has_condition_images
    keys: dict[str, Any] = {}
    # First, so that a folder without targets is refused by this key.
    if targets:
        keys["objective.regression_target"] = objective.regression_target
    if reads_vit_images:
        keys["model.architecture.vit_patch"] = shape.vit_patch
    keys |= _image_keys("latent_image", recipe.data.latent_image)
    if reads_vit_images:
        keys |= _image_keys("vit_image", recipe.data.vit_image)
    keys |= {f"model.architecture.{name}": getattr(shape, name) for name in SHAPE_OF_LATENTS}
    keys["model.tokenizer"] = tokenizer.digest()
    codec_file = get_codec(shape.codec).weights_file
    if codec_file is not None:
        assert recipe.base is not None, "a codec with weights has a base"
        keys["model.base (codec)"] = digest_of(recipe.base / codec_file)
        keys["model.codec_precision"] = recipe.model.codec_precision
    if targets:
        keys["objective.regression_target_norm"] = objective.regression_target_norm
        if objective.regression_target_norm != "none":
            keys["objective.regression_mean_share"] = objective.regression_mean_share
        grids = recipe.sequence.metaquery_grids
        keys["sequence.metaquery_grid"] = grids[0] if len(grids) == 1 else list(grids)
    if targets and target.own_encoder:
        keys["objective.regression_encoder (files)"] = vision_folder_of(objective).digest()
    if targets and target.reads_vision:
        assert recipe.base is not None, "checked"
        encoder = TargetEncoder(shape, objective.regression_target)
        keys["model.architecture.vit_heads"] = shape.vit_heads
        keys["model.base (visual encoder)"] = encoder.digest(WeightsFile(recipe.base))
    return keys | _keys_of_layout(recipe, layout)


def _check_targets(recipe: "Recipe") -> None:
    if recipe.model.trains_everything:
        raise SettingsError(
            "model.train",
            "is all, so the visual encoder moves and its regression targets cannot be prepared; "
            "set it to generation, or objective.regression_weight to 0.",
        )
    if recipe.base is None:
        raise SettingsError(
            "model.base",
            "is null, so the visual encoder has no weights from which regression targets could be "
            "prepared; give a base, or set objective.regression_weight to 0.",
        )


def _image_keys(name: str, settings: ImageSettings) -> dict[str, Any]:
    return {f"data.{name}.{key}": value for key, value in to_plain(settings).items()}


def _keys_of_layout(recipe: "Recipe", layout: str) -> dict[str, Any]:
    """The keys of any layout, None for those that this one does not read."""
    read = get_layout(layout).preparation_keys
    keys = {}
    for other in LAYOUTS.values():
        for name in other.preparation_keys:
            keys[f"sequence.{name}"] = getattr(recipe.sequence, name) if name in read else None
    return keys


class RowEncoder:
    """Turns rows of a source into rows of a prepared one. `targets`: the loaded encoder, `encoder`:
    of `open_encoder`; None if no row needs regression targets from it."""

    def __init__(
        self,
        recipe: "Recipe",
        tokenizer: Tokenizer,
        codec: Codec,
        targets: TargetEncoder | None,
        device: torch.device,
        dtype: str,
        encoder: FolderEncoder | None = None,
    ):
        self.recipe = recipe
        self.sequence = recipe.sequence
        self.tokenizer = tokenizer
        self.codec = codec
        self.targets = targets.to(device) if targets is not None else None
        self.encoder = encoder
        target = get_regression_target(recipe.objective.regression_target)
        self.makes_targets = bool(target.program or targets or encoder) and recipe.regresses
        self.device = device
        self.dtype = dtype
        self.geometry = recipe.architecture.geometry
        # Only for metaqueries, which depend neither on the expert that trains nor on special
        # tokens.
        self._collate = Collator(
            self.geometry,
            SpecialTokens(0, 0, 0, 0),
            train_understanding=True,
            stop_at_context=False,
            targets=target_source(recipe.objective),
        )

    def __call__(self, layout: str, row: Any) -> dict[str, Any]:
        """`row`: what Source.read_whole returns or raises for a source of this layout."""
        if isinstance(row, BadRow):
            return bad(row)
        return get_layout(layout).encode(row, self)

    def ids(self, text: Text) -> list[int]:
        """The token ids of a text; ids are returned as they are."""
        return self.tokenizer.encode(text) if isinstance(text, str) else text

    def image(
        self,
        image: Picture | BadRow | None,
        *,
        latent: bool = False,
        target: bool = False,
        picture: bool = False,
    ) -> dict[str, Any] | None:
        """The requested parts of one image. None: an image that no example of its row has."""
        if image is None:
            return None
        if isinstance(image, BadRow):
            return bad(image)
        assert isinstance(image, Image.Image), "no prepared source is prepared again"
        target = target and self.makes_targets
        stored: dict[str, Any] = {}
        if latent:
            stored |= self._stored_latent(image)
        if not picture and not target:
            return stored
        resized = resize(image, self.geometry.vit_stride, self.recipe.data.vit_image)
        if picture:
            stored["picture"] = png_bytes(resized)
        if target:
            pixels = to_array(resized)
            stored["target"] = tensor_bytes(self.target(pixels), self.dtype)
            stored["target_grid"] = _grid(pixels, self.geometry.vit_stride)
        return stored

    def _stored_latent(self, image: Image.Image) -> dict[str, Any]:
        stride = self.geometry.latent_stride
        pixels = to_array(resize(image, stride, self.recipe.data.latent_image))
        values = self.latent(pixels)
        return {
            "latent": tensor_bytes(values, self.dtype),
            "latent_shape": list(values.shape),
            "latent_grid": _grid(pixels, stride),
        }

    @torch.no_grad()
    def latent(self, pixels: np.ndarray) -> torch.Tensor:
        """[c, h / downsample, w / downsample] of pixels [3, h, w]."""
        with one_thread():
            return self.codec.encode(torch.from_numpy(pixels)[None].to(self.device))[0]

    @torch.no_grad()
    def target(self, pixels: np.ndarray) -> torch.Tensor:
        """[M, W]: the regression targets of an image, one for each metaquery. `pixels`: its view
        for the visual encoder, [3, h, w]."""
        segment = Segment(
            Kind.METAQUERY,
            np.zeros(self.sequence.metaqueries, dtype=np.int64),
            pixels=pixels,
            grid=_grid(pixels, self.geometry.vit_stride),
            sides=self.sequence.metaquery_grids,
            supervises=0,
        )
        batch = self._collate([Sample("", [segment])]).to(self.device)
        if self.targets is None:
            vit_PW = batch.vision.patches_PC[:0]
        else:
            vit_PW = self.targets.vit_features(batch.vision)
        connector = self.targets.connector if self.targets is not None else None
        settings = self.recipe.objective
        features_PW = feature_rows(
            settings, self.encoder, vit_PW, connector, batch.vision, batch.targets
        )
        return regression_targets(features_PW, batch.targets)


def _grid(pixels: np.ndarray, stride: int) -> tuple[int, int]:
    return pixels.shape[1] // stride, pixels.shape[2] // stride
