"""geneval-transformers: GenEval's rules on objects that a Mask2Former of transformers finds.

Thresholds and rules are GenEval's; the weights are not, since its detector (mmdet) can no longer be
installed. Boxes follow from masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from uno_ds.evaluation.clip import Clip, check_folder, unusable_folder

NAME = "geneval-transformers"
CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9
MOST_OBJECTS = 16
POSITION_THRESHOLD = 0.1
BLANK = "#999999"
COLOURS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
)
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}")
ANY_OBJECT = "a photo of a {colour} object"
# COCO's names as GenEval's prompts write them.
RENAMED = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}


@dataclass(frozen=True, eq=False)
class Found:
    """An object: box (left, top, right, bottom) in pixels, mask [h, w], confidence."""

    box: tuple[float, float, float, float]
    mask: np.ndarray
    confidence: float


class Detector:
    """A Mask2Former of a local folder. Raises SettingsError if it is none."""

    def __init__(self, folder: Path | None, device: torch.device):
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation
        from transformers.utils import logging

        logging.disable_progress_bar()
        what = "a Mask2Former, as facebook/mask2former-swin-small-coco-instance"
        check_folder(folder, "--detector", what)
        assert folder is not None, "check_folder raises"
        try:
            model: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
                folder, local_files_only=True
            )
            self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise unusable_folder(folder, "--detector", error) from None
        self._model = model.to(device).eval()
        self._device = device
        self.names = {index: str(name) for index, name in (model.config.id2label or {}).items()}

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> list[tuple[str, Found]]:
        """(class, object) of everything that GenEval may count. As in mmdet, a query is an object
        of each class that it has enough confidence in."""
        inputs = self._processor(images=image, return_tensors="pt")
        output = self._model(pixel_values=inputs["pixel_values"].to(self._device))
        scores = output.class_queries_logits[0].softmax(-1)[:, :-1].cpu()
        masks = torch.nn.functional.interpolate(
            output.masks_queries_logits, size=(image.height, image.width), mode="bilinear"
        )[0].cpu()
        found = []
        # The mask's quality, at most 1, lowers them further.
        for query, class_ in torch.nonzero(scores > CONFIDENCE).tolist():
            entry = _object(masks[query], float(scores[query, class_]))
            if entry is not None:
                found.append((self.names[class_], entry))
        return found


class GenEvalScorer:
    """Whether an image shows what a row of GenEval asks for."""

    def __init__(self, detector: Detector, clip: Clip):
        self._detector, self._clip = detector, clip
        self._classifiers: dict[str, torch.Tensor] = {}

    def __call__(self, image: Image.Image, metadata: Mapping[str, Any]) -> bool:
        objects = confident(self._detector(image), metadata["tag"])

        def colours(name: str, found: Sequence[Found]) -> list[str]:
            return self._colours(image, name, found)

        return is_right(objects, metadata, colours)

    def _colours(self, image: Image.Image, name: str, found: Sequence[Found]) -> list[str]:
        crops = [crop_of(image, thing) for thing in found]
        similar = self._clip.images(crops) @ self._classifier(name).T
        return [COLOURS[index] for index in similar.argmax(-1).tolist()]

    def _classifier(self, name: str) -> torch.Tensor:
        """[colours, C]: the direction of each colour of a class, over the wordings."""
        if name not in self._classifiers:
            rows = []
            for colour in COLOURS:
                texts = [text.format(colour=colour, name=name) for text in TEMPLATES]
                texts.append(ANY_OBJECT.format(colour=colour))
                rows.append(self._clip.texts(texts).mean(0))
            stacked = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
            self._classifiers[name] = stacked
        return self._classifiers[name]


def confident(objects: Sequence[tuple[str, Found]], tag: str) -> dict[str, list[Found]]:
    """Objects of each class above GenEval's threshold, the surest first, at most 16."""
    threshold = COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE
    by_class: dict[str, list[Found]] = {}
    for name, thing in sorted(objects, key=lambda entry: -entry[1].confidence):
        if thing.confidence > threshold:
            by_class.setdefault(name, []).append(thing)
    return {name: things[:MOST_OBJECTS] for name, things in by_class.items()}


def is_right(objects: Mapping[str, Sequence[Found]], metadata: Mapping[str, Any], colours) -> bool:
    """GenEval's rules: every clause of `include` has its objects, in their colour and position, and
    no clause of `exclude`. `colours(name, objects)`: the colour of each object."""
    groups: list[Sequence[Found] | None] = []
    for clause in metadata.get("include", []):
        groups.append(_matched(objects, clause, groups, colours))
    if any(group is None for group in groups):
        return False
    return all(
        len(_of_class(objects, clause["class"])) < clause["count"]
        for clause in metadata.get("exclude", [])
    )


def relations(one: Found, other: Found) -> set[str]:
    """Where an object is as seen from another, less a tenth of both their sides."""
    offset = _centre(one) - _centre(other)
    free = np.abs(offset) - POSITION_THRESHOLD * (_sides(one) + _sides(other))
    revised = np.maximum(free, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    across, down = revised / np.linalg.norm(offset)
    names = {
        "left of": across < -0.5,
        "right of": across > 0.5,
        "above": down < -0.5,
        "below": down > 0.5,
    }
    return {name for name, holds in names.items() if holds}


def crop_of(image: Image.Image, thing: Found) -> Image.Image:
    """The object over grey, cut to its box."""
    mask = Image.fromarray((thing.mask * 255).astype(np.uint8))
    blank = Image.new("RGB", image.size, BLANK)
    left, top, right, bottom = (round(side) for side in thing.box)
    return Image.composite(image, blank, mask).crop((left, top, right, bottom))


def _matched(
    objects: Mapping[str, Sequence[Found]],
    clause: Mapping[str, Any],
    groups: Sequence[Sequence[Found] | None],
    colours,
) -> Sequence[Found] | None:
    """The objects of a clause; None if it does not hold."""
    count = clause["count"]
    found = _of_class(objects, clause["class"])[:count]
    if len(found) < count:
        return None
    if "color" in clause and colours(clause["class"], found).count(clause["color"]) < count:
        return None
    if clause.get("position") is None:
        return found
    relation, target = clause["position"]
    others = groups[target]
    if others is None:
        return None
    holds = all(relation in relations(thing, other) for thing, other in product(found, others))
    return found if holds else None


def _of_class(objects: Mapping[str, Sequence[Found]], name: str) -> Sequence[Found]:
    return objects.get(name) or objects.get(RENAMED.get(name, name)) or []


def _object(mask_hw: torch.Tensor, confidence: float) -> Found | None:
    """Confidence as in the public post-processing: of the class, times the mean of the mask."""
    inside = mask_hw > 0
    if not inside.any():
        return None
    quality = float((mask_hw.sigmoid() * inside).sum() / inside.sum())
    mask = inside.numpy()
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return Found(box, mask, confidence * quality)


def _centre(thing: Found) -> np.ndarray:
    left, top, right, bottom = thing.box
    return np.array([(left + right) / 2, (top + bottom) / 2])


def _sides(thing: Found) -> np.ndarray:
    left, top, right, bottom = thing.box
    return np.array([right - left, bottom - top])
