"""Encoders in a folder of `transformers`: features of images of any size, and every folder that is
none is one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from vision_folders import write_dinov2, write_siglip

from uno_ds.model.vision_folder import (
    FolderEncoder,
    read_vision_folder,
    vision_flops,
    vision_parameters,
)
from uno_ds.settings import SettingsError

KEY = "objective.regression_encoder"
CPU = torch.device("cpu")


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> FolderEncoder:
    return FolderEncoder(read_vision_folder(folder, KEY), CPU, dtype, KEY)


def image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).uniform(-1, 1, (3, height, width)).astype(np.float32)
    return torch.from_numpy(values)


@pytest.mark.parametrize("write", [write_dinov2, write_siglip])
def test_features_are_the_patch_rows_of_the_model_on_the_resized_and_normalised_image(
    write, tmp_path
):
    encoder = opened(write(tmp_path / "encoder"))
    patch = encoder.folder.patch
    assert encoder.folder.mean == (0.4, 0.5, 0.6) and encoder.folder.side == 16
    same, other = image(2 * patch, 3 * patch), image(40, 24, seed=1)
    got = encoder.features([same, other], [(2, 3), (5, 3)])
    assert got.shape == (6 + 15, 8) and not got.requires_grad
    resized = F.interpolate(other[None], (5 * patch, 3 * patch), mode="bicubic", antialias=True)
    mean, deviation = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    for pixels, rows, features in ((same, 6, got[:6]), (resized[0].clamp(-1, 1), 15, got[6:])):
        colours = (pixels.permute(1, 2, 0) / 2 + 0.5 - mean) / deviation
        options = {"interpolate_pos_encoding": True} if write is write_siglip else {}
        tokens = encoder.model(pixel_values=colours.permute(2, 0, 1)[None], **options)
        wanted = tokens.last_hidden_state[0, -rows:]
        torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5)
    assert encoder.features([], []).shape == (0, 8)


def test_an_images_features_do_not_depend_on_the_others(tmp_path):
    encoder = opened(write_dinov2(tmp_path / "encoder"))
    alone = encoder.features([image(9, 12)], [(3, 4)])
    together = encoder.features([image(15, 6, 1), image(9, 12)], [(5, 2), (3, 4)])
    assert torch.equal(together[10:], alone)


def test_register_tokens_are_left_out(tmp_path):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "encoder")
    encoder = opened(tmp_path / "encoder")
    pixels = image(8, 12)
    tokens = encoder.tokens(encoder._pixels(pixels, 2, 3))
    assert tokens.shape[1] == 1 + 4 + 6
    assert torch.equal(encoder.features([pixels], [(2, 3)]), tokens[0, 5:])


def test_operations_and_parameters_are_those_of_the_model(tmp_path):
    from torch.utils.flop_counter import FlopCounterMode

    folder = write_dinov2(tmp_path / "encoder")
    encoder = opened(folder)
    assert vision_parameters(folder) == sum(p.numel() for p in encoder.model.parameters())
    with FlopCounterMode(display=False) as counter:
        encoder.features([image(9, 12)], [(3, 4)])
    # torch counts no attention on a CPU: two products of 13 tokens in each of 2 layers.
    attention = 2 * 2 * 2 * 13 * 13 * 8
    counted = counter.get_total_flops()
    assert vision_flops(folder, 3, 4) in (counted, counted + attention)
    assert vision_flops(folder, 6, 8) > 3 * vision_flops(folder, 3, 4)


def test_another_weight_or_setting_changes_the_digest(tmp_path):
    first = read_vision_folder(write_dinov2(tmp_path / "first"), KEY).digest()
    assert read_vision_folder(write_dinov2(tmp_path / "same"), KEY).digest() == first
    assert read_vision_folder(write_dinov2(tmp_path / "seed", seed=1), KEY).digest() != first
    (tmp_path / "same" / "preprocessor_config.json").write_text("{}")
    assert read_vision_folder(tmp_path / "same", KEY).digest() != first


def swin(folder: Path) -> Path:
    """A pyramid, whose last features are of fewer and larger patches."""
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2
    )
    SwinModel(config).save_pretrained(folder)
    return folder


def without_patches(folder: Path) -> Path:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertModel(config).save_pretrained(folder)
    return folder


def without_weights(folder: Path) -> Path:
    write_dinov2(folder)
    (folder / "model.safetensors").unlink()
    return folder


def unknown_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "nobody"}))
    return folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is no JSON"),
        ("[1]", "holds no object"),
        ('{"image_mean": [0.5]}', "must be three numbers each, got [0.5] and (0.229"),
        ('{"image_std": [0.5, 0, 0.5]}', "must be three numbers each"),
        ('{"image_std": "abc"}', "must be three numbers each"),
        ('{"image_mean": [0.5, NaN, 0.5]}', "must be three numbers each"),
    ],
)
def test_preprocessing_that_cannot_be_used_is_one_line(content, message, tmp_path):
    folder = write_dinov2(tmp_path / "encoder")
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(SettingsError) as raised:
        read_vision_folder(folder, KEY)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: folder, "is no folder with a config.json"),
        (without_patches, "has no patch_size: it is no image encoder"),
        (swin, "cannot encode an image of 2 x 2 patches"),
        (without_weights, "model.safetensors"),
        (unknown_model, "nobody"),
    ],
)
def test_a_folder_that_is_no_encoder_is_one_line_that_names_it(write, message, tmp_path):
    folder = write(tmp_path / "encoder")
    with pytest.raises(SettingsError) as raised:
        opened(folder)
    said = str(raised.value)
    assert said.startswith(f"{KEY}: '{folder}'") and message in said and "\n" not in said


def test_a_model_that_does_not_give_a_row_for_each_patch_is_refused(tmp_path, monkeypatch):
    folder = write_dinov2(tmp_path / "encoder")
    monkeypatch.setattr(FolderEncoder, "tokens", lambda self, pixels: torch.zeros(1, 3, 8))
    with pytest.raises(SettingsError, match="gives features of shape .1, 3, 8. for an image of"):
        opened(folder)
