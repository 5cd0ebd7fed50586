"""Sampling follows the conventions of the public BAGEL's inference: defaults for each task, count
of steps, sizes of views."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import picture, random_base

from uno_ds.commands import sample
from uno_ds.commands.sample import main
from uno_ds.commands.sample_flags import sample_parser
from uno_ds.data.images import inference_size, to_array
from uno_ds.generation.inference import (
    CaptionSettings,
    SampleSettings,
    caption_tokens,
    codec_size,
    image_views,
)
from uno_ds.generation.inference_model import open_model
from uno_ds.sequence.composition import Geometry, ImageViews
from uno_ds.settings import SettingsError, build

BAGEL = Geometry(latent_stride=16, latent_values=64, latent_side=64, vit_stride=14, vit_side=70)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return random_base(tmp_path_factory.mktemp("base"))


def drawn(base: Path, out: Path, *words) -> tuple[np.ndarray, dict]:
    """The picture that the command line draws, and the facts in it."""
    if words[0] == "edit":
        picture().save(out.with_suffix(".source.png"))
        words = (*words, "--image", out.with_suffix(".source.png"), "--instruction", "turn it red")
    else:
        words = (*words, "--prompt", "a cup", "--height", 16, "--width", 24)
    assert main([str(word) for word in (*words, "--checkpoint", base, "--out", out)]) == 0
    image = Image.open(out / "0000.png")
    return np.asarray(image).astype(int), json.loads(image.text["uno_ds"])


def resolved(*words) -> dict:
    """The settings that a command line comes to."""
    options = sample_parser().parse_args([str(word) for word in words])
    if options.command == "edit":
        return sample._sampler_values(
            options, sample._recipe_settings(options, "samples.edit").edit
        )
    return sample._sampler_values(options, sample._recipe_settings(options, "samples"))


def test_a_picture_and_an_edit_are_drawn_with_the_public_defaults_of_their_task(base, tmp_path):
    _, facts = drawn(base, tmp_path / "generated", "generate", "--steps", 1)
    names = ("text_guidance", "image_guidance", "guidance_interval", "renormalise", "shift")
    assert {name: facts.get(name) for name in names} == {
        "text_guidance": 4.0,
        "image_guidance": None,
        "guidance_interval": [0.4, 1.0],
        "renormalise": "global",
        "shift": 3.0,
    }
    assert "edit" not in facts and facts["renormalise_least"] == 0
    _, facts = drawn(base, tmp_path / "edited", "edit", "--steps", 1)
    assert {name: facts.get(name) for name in names} == {
        "text_guidance": 4.0,
        "image_guidance": 2.0,
        "guidance_interval": [0.0, 1.0],
        "renormalise": "text-channel",
        "shift": 3.0,
    }
    assert facts["renormalise_least"] == 0


def test_keys_of_old_recipes_mean_text_to_image_and_edits_have_their_own():
    settings = build(
        SampleSettings, {"text_guidance": 2.0, "guidance_interval": [0.2, 0.8], "steps": 7}
    )
    assert (settings.text_guidance, settings.guidance_interval) == (2.0, [0.2, 0.8])
    edit = settings.edit
    assert (edit.text_guidance, edit.guidance_interval, edit.steps) == (4.0, [0.0, 1.0], 50)
    settings = build(SampleSettings, {"edit": {"image_guidance": 1.5, "renormalise": "none"}})
    assert (settings.edit.image_guidance, settings.edit.renormalise) == (1.5, "none")
    assert settings.renormalise == "global"
    with pytest.raises(SettingsError, match=r"^samples.edit.image_guidance: must be at least 1"):
        build(SampleSettings, {"edit": {"image_guidance": 0.5}}, "samples")


def test_settings_come_from_flags_then_from_the_recipe_of_the_run_then_from_the_defaults(
    tmp_path, capsys
):
    checkpoint = tmp_path / "run" / "checkpoints" / "step_5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (checkpoint.parent / "latest").write_text("step_5\n")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text("samples: {steps: 9, shift: 2.0, edit: {steps: 11, image_guidance: 1.5}}\n")
    for path in (tmp_path / "run", checkpoint, checkpoint.parent / "latest"):
        values = resolved("generate", "--checkpoint", path, "--shift", 1)
        assert (values["steps"], values["shift"], values["text_guidance"]) == (9, 1.0, 4.0)
        values = resolved("edit", "--checkpoint", path, "--text-guidance", 3)
        assert (values["steps"], values["shift"], values["image_guidance"]) == (11, 3.0, 1.5)
        assert (values["text_guidance"], values["renormalise"]) == (3.0, "text-channel")
        out = capsys.readouterr().out.splitlines()
        assert out == [
            f"settings that no flag gives: samples of {recipe}",
            f"settings that no flag gives: samples.edit of {recipe}",
        ]
    recipe.write_text("samples: {edit: {steps: 0}}\n")
    with pytest.raises(SettingsError, match="--checkpoint: .*recipe.yaml .*samples.edit.steps"):
        resolved("edit", "--checkpoint", checkpoint)
    recipe.unlink()
    assert resolved("edit", "--checkpoint", checkpoint)["steps"] == 50


@pytest.mark.parametrize("command", ["generate", "edit"])
def test_n_timesteps_are_n_minus_1_euler_steps(command, base, tmp_path):
    by_timesteps, facts = drawn(base, tmp_path / "timesteps", command, "--num-timesteps", 4)
    by_steps, _ = drawn(base, tmp_path / "steps", command, "--steps", 3)
    assert facts["steps"] == 3
    assert np.abs(by_timesteps - by_steps).max() <= 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--num-timesteps", "50", "--steps", "49"],
            "--num-timesteps: does not go with --steps: 50 timesteps are 49 steps; give one of "
            "them.",
        ),
        (
            ["--num-timesteps", "1"],
            "--num-timesteps: must be at least 2, got 1: N timesteps are N - 1 Euler steps.",
        ),
    ],
)
def test_timesteps_that_cannot_be_are_one_line(flags, message, base, tmp_path, capsys):
    words = ["generate", "--checkpoint", base, "--prompt", "x", "--out", tmp_path / "out", *flags]
    assert main([str(word) for word in words]) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


@pytest.mark.parametrize(
    "source, for_codec, for_vit",
    [
        # Sizes (width, height) worked out by hand: scaled into [512, 1024], rounded to pixels, then
        # to 16; that picture scaled below 980, rounded to pixels, then to 14.
        ((1920, 1080), (1024, 576), (980, 546)),
        ((640, 480), (688, 512), (686, 518)),
        ((300, 200), (768, 512), (770, 518)),
        ((100, 100), (512, 512), (518, 518)),
        # 3840 x 512 has too many pixels: 3520 x 464, whose longer side is brought to 1024.
        ((3000, 400), (1024, 128), (980, 126)),
        ((400, 3000), (128, 1024), (126, 980)),
    ],
)
def test_the_visual_encoder_reads_the_picture_that_the_codec_reads(source, for_codec, for_vit):
    image = picture(*source)
    views = image_views(BAGEL, image)
    assert views.latent.shape == (3, for_codec[1], for_codec[0])
    assert views.vit.shape == (3, for_vit[1], for_vit[0])
    assert codec_size(BAGEL, image) == (for_codec[1], for_codec[0])
    resized = image.resize(for_codec, Image.Resampling.BICUBIC)
    assert np.array_equal(views.latent, to_array(resized))
    assert np.array_equal(views.vit, to_array(resized.resize(for_vit, Image.Resampling.BICUBIC)))


def test_a_caption_reads_the_picture_as_the_codec_would(base):
    """Seen by the visual encoder only: 20 x 12 becomes 28 x 16 for this model's codec, which is
    read as 32 x 16 in patches of 8."""
    opened, image, logits = open_model(base), picture(20, 12), {}
    for_codec = image.resize((28, 16), Image.Resampling.BICUBIC)
    views = {
        "picture": image,
        "by hand": ImageViews(vit=to_array(for_codec.resize((32, 16), Image.Resampling.BICUBIC))),
    }
    for name, view in views.items():
        caption_tokens(
            opened.model,
            opened.codec,
            opened.tokenizer,
            [view],
            build(CaptionSettings, {"max_tokens": 1}),
            observe=lambda _place, rows, name=name: logits.update({name: rows[0]}),
        )
    assert np.allclose(logits["picture"], logits["by hand"], rtol=1e-5, atol=1e-6)


def test_a_view_is_never_larger_than_the_position_tables():
    for width in range(8, 4000, 31):
        for height in range(max(8, width // 8), min(4000, 8 * width), 37):
            for_codec = inference_size(width, height, 16, 1024, 512)
            for_vit = inference_size(*for_codec, 14, 980, 224)
            assert max(for_codec) <= 1024 and max(for_vit) <= 980
            assert all(length > 0 and length % 16 == 0 for length in for_codec)
            assert all(length > 0 and length % 14 == 0 for length in for_vit)
