"""Scores by models of local folders, with small random ones: no weights are fetched."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_files import WRITERS
from PIL import Image
from small_runs import picture
from tokenizers import Tokenizer, models, pre_tokenizers

from uno_ds.commands.evaluate import main
from uno_ds.evaluation.benchmarks import BENCHMARKS
from uno_ds.evaluation.clip import Clip
from uno_ds.evaluation.detection import COLOURS, Detector, Found, GenEvalScorer, crop_of
from uno_ds.evaluation.folder import fingerprint
from uno_ds.evaluation.local_scoring import frechet_distance, score_captions, score_geneval
from uno_ds.evaluation.scoring import open_scored
from uno_ds.settings import SettingsError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("clip")
    words = ["<pad>", "</s>", "<unk>", *"a photo of cup cat dog number object colored".split()]
    vocabulary = {word: number for number, word in enumerate([*words, *COLOURS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.model_max_length = 77
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "projection_dim": 8}
    text = small | {
        "vocab_size": len(vocabulary),
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    vision = small | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), fast).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("detector")
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_layers=1,
        encoder_feedforward_dim=16,
        decoder_layers=2,
        dim_feedforward=16,
        num_attention_heads=2,
        num_queries=5,
        id2label={0: "cup", 1: "dog"},
    )
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def drawn(name: str, folder: Path) -> tuple[Path, Path]:
    """(data, folder of images) of a benchmark."""
    benchmark, data, root = BENCHMARKS[name], WRITERS[name](folder), folder / "images"
    for seed, item in enumerate(benchmark.items(data, "")):
        for number in range(benchmark.images_per_prompt):
            path = root / benchmark.scored_path(item, number, "")
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(40, 32, seed=seed + number).save(path)
    return data, root


def test_the_clip_score_is_a_cosine(clip):
    model = Clip(clip, CPU)
    image = picture(seed=1)
    (ours,), (theirs,) = model.images([image]), model.texts(["a red cup"])
    assert float(ours.norm()) == pytest.approx(1, abs=1e-5)
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))
    assert model.score(image, "a red cup") == pytest.approx(max(0.0, 100 * cosine), abs=1e-3)
    assert 0 <= model.score(image, "cup " * 500) <= 100


@pytest.mark.parametrize("name", ["parti", "coco"])
def test_captions_are_scored_from_a_local_folder(name, clip, tmp_path, capsys, monkeypatch):
    def score(model: Clip, image: Image.Image, text: str) -> float:
        return image.getpixel((0, 0))[0] / 10 + len(text)

    monkeypatch.setattr(Clip, "score", score)
    data, root = drawn(name, tmp_path)
    words = ["score", "--benchmark", name, "--images", root, "--data", data, "--clip", clip]
    assert main([str(word) for word in [*words, "--local"]]) == 0, capsys.readouterr().err
    plain = json.loads((tmp_path / "images-evaluation/scores/clip.json").read_text())
    assert 0 <= plain["estimates"]["CLIP score"]["value"] <= 100
    assert len(plain["rows"]) == (10 if name == "parti" else 5)
    assert plain["scorer"]["weights"] == fingerprint([clip / "model.safetensors"])
    for row in plain["rows"]:
        image = Image.open(row["images"][0]).convert("RGB")
        assert row["values"]["CLIP score"] == [score(None, image, row["prompt"]), 1]
    if name == "parti":
        assert {"Animals", "Food"} <= set(plain["estimates"])


def test_geneval_runs_from_local_folders(clip, detector, tmp_path, capsys):
    data, root = drawn("geneval", tmp_path)
    words = ["score", "--benchmark", "geneval", "--images", root, "--data", data, "--clip", clip]
    assert main([str(word) for word in [*words, "--detector", detector]]) == 0, capsys.readouterr()
    path = tmp_path / "images-evaluation/scores/geneval-transformers.json"
    plain = json.loads(path.read_text())
    assert plain["scorer"]["name"] == "geneval-transformers" and len(plain["rows"]) == 10
    files = [folder / "model.safetensors" for folder in (detector, clip)]
    assert plain["scorer"]["weights"] == [fingerprint([file]) for file in files]
    assert set(plain["headlines"]["overall"]) == {row["group"] for row in plain["rows"]}


def test_geneval_counts_the_images_of_a_prompt_that_are_right(
    clip, detector, tmp_path, monkeypatch
):
    def scorer(*models: object):
        return lambda image, metadata: image.getpixel((0, 0))[0] % 2 == len(metadata["prompt"]) % 2

    monkeypatch.setattr("uno_ds.evaluation.local_scoring.GenEvalScorer", scorer)
    data, root = drawn("geneval", tmp_path)
    scored = open_scored(BENCHMARKS["geneval"], root, data, "", False)
    result = score_geneval(scored, detector, clip, CPU)
    shares = set()
    for row, item in zip(result.rows, scored.items, strict=True):
        images = [Image.open(path).convert("RGB") for _, path in scored.present(item)]
        right = sum(scorer()(image, item.facts["metadata"]) for image in images)
        assert len(images) == 4 and row.values == {item.group: (100.0 * right, 4)}
        shares.add(right)
    assert len(shares) > 1


def test_a_detector_finds_objects_with_boxes_around_their_masks(detector):
    image = picture(48, 36)
    found = Detector(detector, CPU)(image)
    for name, thing in found:
        assert name in ("cup", "dog") and thing.mask.shape == (36, 48)
        left, top, right, bottom = (int(side) for side in thing.box)
        assert thing.mask[top:bottom, left:right].sum() == thing.mask.sum() > 0
        assert 0 < thing.confidence <= 1


def test_a_query_is_an_object_of_each_class_it_has_confidence_in(detector):
    """As mmdet, which GenEval was written for. The second query is nothing."""

    class Output:
        # 4 of 7 a cup, 2 of 7 a dog, which is below 0.3.
        class_queries_logits = torch.tensor([[[4.0, 2.0, 1.0], [1e-9, 1e-9, 1.0]]]).log()
        masks_queries_logits = torch.full((1, 2, 4, 4), 50.0)

    found = Detector(detector, CPU)
    found._model = lambda pixel_values: Output()
    objects = found(picture(8, 8))
    assert [name for name, _ in objects] == ["cup"]
    assert objects[0][1].confidence == pytest.approx(4 / 7)
    Output.class_queries_logits = torch.tensor([[[4.0, 3.0, 1.0], [1e-9, 1e-9, 1.0]]]).log()
    objects = found(picture(8, 8))
    assert [name for name, _ in objects] == ["cup", "dog"]
    assert [thing.confidence for _, thing in objects] == pytest.approx([4 / 8, 3 / 8])


def test_colours_are_read_from_the_object_alone(clip):
    """The crop holds the object over grey, in its box."""
    image = Image.new("RGB", (20, 20), "red")
    mask = np.zeros((20, 20), bool)
    mask[5:15, 5:10] = True
    mask[5, 5] = False
    crop = crop_of(image, Found((5.0, 5.0, 10.0, 15.0), mask, 1.0))
    assert crop.size == (5, 10)
    assert crop.getpixel((0, 0)) == (153, 153, 153) and crop.getpixel((2, 5)) == (255, 0, 0)
    scorer = GenEvalScorer(
        lambda image: [("cup", Found((5, 5, 10, 15), mask, 0.99))], Clip(clip, CPU)
    )
    right = [
        scorer(image, {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": colour}]})
        for colour in COLOURS
    ]
    assert sum(right) == 1


class Features(torch.nn.Module):
    """Six numbers of an image, in the place of Inception."""

    num_features = 6

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = images.double()
        return torch.cat([values.mean((2, 3)), values.std((2, 3))], dim=1)


def test_fid_is_that_of_torchmetrics_and_zero_for_the_same_images(clip, tmp_path, monkeypatch):
    from torchmetrics.image.fid import FrechetInceptionDistance

    def metric(path: Path):
        return FrechetInceptionDistance(feature=Features())

    monkeypatch.setattr("uno_ds.evaluation.local_scoring._fid_metric", metric)
    for name, first in (("real", 0), ("other", 100)):
        (tmp_path / name).mkdir()
        for seed in range(12):
            picture(seed=first + seed).save(tmp_path / name / f"{seed}.png")
    real, other = (sorted((tmp_path / name).iterdir()) for name in ("real", "other"))
    inception = tmp_path / "weights.pth"
    assert frechet_distance(real, real, inception, CPU) == pytest.approx(0, abs=1e-3)
    # The distance of two Gaussians, by hand.
    features = [Features()(_as_batch(paths)).numpy() for paths in (real, other)]
    means, spreads = zip(*((part.mean(0), np.cov(part.T)) for part in features))
    roots = np.sqrt(np.linalg.eigvals(spreads[0] @ spreads[1]).astype(complex)).real.sum()
    distance = ((means[0] - means[1]) ** 2).sum() + np.trace(spreads[0] + spreads[1]) - 2 * roots
    assert frechet_distance(real, other, inception, CPU) == pytest.approx(distance, rel=1e-3)
    data, root = drawn("coco", tmp_path)
    scored = open_scored(BENCHMARKS["coco"], root, data, "", False)
    result = score_captions(scored, clip, CPU, tmp_path / "real", inception)
    assert result.estimates()["FID"].value > 0 and result.estimates()["FID"].low is None


def _as_batch(paths: list[Path]) -> torch.Tensor:
    from uno_ds.evaluation.local_scoring import _batches

    return torch.cat(list(_batches(paths)))


MISTAKES = [
    ("geneval", [], "--detector: is required: the local folder of a Mask2Former"),
    ("geneval", ["--detector", "."], "--detector: . holds no config.json"),
    ("parti", [], "--clip: is required: the local folder of a CLIP model"),
    ("coco", ["--clip", "CLIP", "--references", "."], "--inception: FID needs --references and"),
    (
        "coco",
        ["--clip", "CLIP", "--references", ".", "--inception", "no.pth"],
        "--inception: no.pth",
    ),
]


@pytest.mark.parametrize("name, words, message", MISTAKES)
def test_a_missing_model_is_one_line(name, words, message, clip, tmp_path, monkeypatch, capsys):
    data, root = drawn(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = [str(clip) if word == "CLIP" else word for word in words]
    base = ["score", "--benchmark", name, "--images", str(root), "--data", str(data)]
    assert main([*base, *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_a_folder_that_transformers_cannot_load_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SettingsError, match="--clip: .* cannot be loaded by transformers"):
        Clip(tmp_path, CPU)
