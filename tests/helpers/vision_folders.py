"""Folders of small vision models of `transformers` with random weights."""

import json
from pathlib import Path
from typing import Any

import torch


def write_dinov2(folder: Path, patch: int = 3, width: int = 8, seed: int = 0, **more: Any) -> Path:
    """DINOv2's layout: a class token before the patches."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4 * patch,
        patch_size=patch,
        mlp_ratio=2,
        **more,
    )
    return _write(folder, Dinov2Model, config, seed)


def write_siglip(folder: Path, patch: int = 4, width: int = 8) -> Path:
    """A vision tower with a fixed size of images and no class token."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=4 * patch,
        patch_size=patch,
    )
    return _write(folder, SiglipVisionModel, config, seed=1)


def _write(folder: Path, kind: Any, config: Any, seed: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
        model.save_pretrained(folder)
    preprocessor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "size": 16}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder
