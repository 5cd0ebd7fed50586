"""Scores of a folder by models of kept libraries, whose weights lie in local folders."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from uno_ds.evaluation.benchmark import open_image
from uno_ds.evaluation.benchmarks.captions import CaptionBenchmark
from uno_ds.evaluation.benchmarks.geneval import GenEval
from uno_ds.evaluation.clip import Clip
from uno_ds.evaluation.detection import NAME, Detector, GenEvalScorer
from uno_ds.evaluation.folder import fingerprint
from uno_ds.evaluation.results import Result
from uno_ds.evaluation.scoring import Scored, result_of
from uno_ds.settings import SettingsError

IMAGE_FILES = {".png", ".jpg", ".jpeg", ".webp"}
WEIGHT_FILES = {".safetensors", ".bin"}
FID_FEATURES = 2048
INCEPTION_SIDE = 299
IMAGES_AT_ONCE = 16


def score_geneval(
    scored: Scored, detector: Path | None, clip: Path, device: torch.device
) -> Result:
    """Every image is right or wrong by GenEval's rules."""
    benchmark = scored.benchmark
    assert isinstance(benchmark, GenEval), "the only benchmark with these rules"
    scorer = GenEvalScorer(Detector(detector, device), Clip(clip, device))
    assert detector is not None, "Detector raises without one"
    rows = []
    for item in tqdm(scored.items, desc=NAME, unit="prompt", disable=None):
        paths = [path for _, path in scored.present(item)]
        if not paths:
            continue
        metadata = item.facts["metadata"]
        right = [scorer(open_image(path, "--images"), metadata) for path in paths]
        row = benchmark.row(item, right)
        row.images = scored.shown(paths)
        rows.append(row)
    description = {
        "kind": "local",
        "name": NAME,
        "detector": str(detector),
        "clip": str(clip),
        "weights": [_weights_of(detector), _weights_of(clip)],
    }
    return result_of(scored, description, rows)


def score_captions(
    scored: Scored,
    clip: Path,
    device: torch.device,
    references: Path | None = None,
    inception: Path | None = None,
) -> Result:
    """CLIP scores, and FID if there are reference images."""
    benchmark = scored.benchmark
    assert isinstance(benchmark, CaptionBenchmark), "others have no captions"
    if (references is None) != (inception is None):
        flag = "--inception" if inception is None else "--references"
        raise SettingsError(flag, "FID needs --references and --inception: give both or none.")
    if references is not None and inception is not None:
        # Refuses what is missing before an hour of CLIP.
        _fid_metric(inception)
        _image_files(references)
    model = Clip(clip, device)
    rows, drawn = [], []
    for item in tqdm(scored.items, desc="CLIP", unit="image", disable=None):
        paths = [path for _, path in scored.present(item)]
        for path in paths:
            row = benchmark.row(item, model.score(open_image(path, "--images"), item.prompt))
            row.images = scored.shown([path])
            rows.append(row)
        drawn += paths
    description: dict[str, Any] = {
        "kind": "local",
        "name": "clip",
        "clip": str(clip),
        "weights": _weights_of(clip),
    }
    extra: dict[str, float] = {}
    if references is not None and inception is not None:
        extra["FID"] = frechet_distance(_image_files(references), drawn, inception, device)
        description["references"] = str(references)
    return result_of(scored, description, rows, extra=extra)


def _weights_of(folder: Path) -> str:
    """Tells the models of two folders apart."""
    return fingerprint([path for path in folder.iterdir() if path.suffix in WEIGHT_FILES])


def frechet_distance(
    real: Sequence[Path], drawn: Sequence[Path], inception: Path, device: torch.device
) -> float:
    """FID by torchmetrics, over features of torch-fidelity's Inception. Raises SettingsError."""
    metric = _fid_metric(inception).to(device)
    for paths, is_real in ((real, True), (drawn, False)):
        for batch in _batches(paths):
            metric.update(batch.to(device), real=is_real)
    try:
        return float(metric.compute())
    except RuntimeError as error:
        raise SettingsError("--references", f"FID cannot be computed: {error}") from None


def _fid_metric(inception: Path) -> Any:
    if not inception.is_file():
        message = f"{inception} is not a file; give torch-fidelity's weights of Inception."
        raise SettingsError("--inception", message)
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        return FrechetInceptionDistance(
            feature=FID_FEATURES, feature_extractor_weights_path=str(inception)
        )
    except ImportError as error:
        message = (
            f"FID needs torchmetrics and torch-fidelity: pip install 'uno_ds[evaluate]' ({error})."
        )
        raise SettingsError("--inception", message) from None


def _batches(paths: Sequence[Path]) -> Iterator[torch.Tensor]:
    """uint8 [B, 3, 299, 299]: images in Inception's size, since those of a folder may differ."""
    for start in range(0, len(paths), IMAGES_AT_ONCE):
        images = [
            open_image(path, "--references") for path in paths[start : start + IMAGES_AT_ONCE]
        ]
        side = (INCEPTION_SIDE, INCEPTION_SIDE)
        resized = [image.resize(side, Image.Resampling.BICUBIC) for image in images]
        arrays = np.stack([np.asarray(image) for image in resized])
        yield torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def _image_files(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_FILES)
    if len(paths) < 2:
        raise SettingsError("--references", f"{folder} holds fewer than two images.")
    return paths
