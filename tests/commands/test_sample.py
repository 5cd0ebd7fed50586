"""The command line of sampling: files and flags in, PNG files and texts out, every mistake one
line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import metadata
from PIL import Image
from small_runs import picture, random_base

from uno_ds.commands.sample import main
from uno_ds.data.text import Tokenizer
from uno_ds.generation.inference import SampleSettings, generate
from uno_ds.generation.inference_model import open_model
from uno_ds.settings import build


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return random_base(tmp_path_factory.mktemp("base"))


def run(*words, capsys) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_generate_writes_a_picture_for_each_prompt_with_what_made_it(base, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a blue square.\n\n  two cups  \n")
    code, out, err = run(
        "generate",
        "--checkpoint",
        base,
        "--prompt",
        "a red circle.",
        "--prompts",
        tmp_path / "prompts.txt",
        "--out",
        tmp_path / "out",
        "--height",
        16,
        "--width",
        24,
        "--steps",
        3,
        "--seed",
        11,
        "--batch",
        2,
        "--renormalise",
        "text-channel",
        capsys=capsys,
    )
    assert (code, err) == (0, "")
    paths = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in paths] == ["0000.png", "0001.png", "0002.png"] and len(
        out.splitlines()
    ) == 3
    facts = [metadata(path) for path in paths]
    assert [(fact["prompt"], fact["seed"]) for fact in facts] == [
        ("a red circle.", 11),
        ("a blue square.", 12),
        ("two cups", 13),
    ]
    assert (
        facts[0]["steps"] == 3
        and facts[0]["renormalise"] == "text-channel"
        and facts[0]["checkpoint"] == str(base)
        and facts[0]["height"] == 16
    )
    # The metadata is enough to draw the picture again, alone.
    fact = facts[2]
    known = {
        name: fact[name]
        for name in (
            "height",
            "width",
            "steps",
            "shift",
            "text_guidance",
            "guidance_interval",
            "renormalise",
            "seed",
        )
    }
    opened = open_model(base)
    again = generate(
        opened.model,
        opened.codec,
        opened.tokenizer,
        build(SampleSettings, known | {"prompts": [fact["prompt"]]}),
    )[0]
    assert (
        np.abs(np.asarray(again).astype(int) - np.asarray(Image.open(paths[2])).astype(int)).max()
        <= 1
    )


def test_edit_takes_a_file_of_requests_keeps_sizes_and_batches_equal_ones(base, tmp_path, capsys):
    picture(40, 30).save(tmp_path / "wide.png")
    picture(30, 40, seed=1).save(tmp_path / "tall.jpg")
    rows = [
        {"image": "wide.png", "instruction": "make it red"},
        {"image": "wide.png", "instruction": "turn it"},
        {"image": "tall.jpg", "instruction": "make it red"},
    ]
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = run(
        "edit",
        "--checkpoint",
        base,
        "--edits",
        tmp_path / "edits.jsonl",
        "--out",
        tmp_path / "out",
        "--steps",
        2,
        capsys=capsys,
    )
    assert (code, err) == (0, "")
    sizes = [Image.open(tmp_path / "out" / f"000{number}.png").size for number in range(3)]
    assert sizes == [(32, 24), (32, 24), (24, 32)]
    assert [
        metadata(tmp_path / "out" / f"000{number}.png")["instruction"] for number in range(3)
    ] == ["make it red", "turn it", "make it red"]
    alone = run(
        "edit",
        "--checkpoint",
        base,
        "--image",
        tmp_path / "tall.jpg",
        "--instruction",
        "make it red",
        "--out",
        tmp_path / "alone",
        "--steps",
        2,
        "--seed",
        2,
        capsys=capsys,
    )
    assert alone[0] == 0
    pictures = [
        np.asarray(Image.open(path)).astype(int)
        for path in (tmp_path / "alone/0000.png", tmp_path / "out/0002.png")
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_caption_prints_a_text_for_each_image_clean_or_from_its_noised_latents(
    base, tmp_path, capsys
):
    for number in range(3):
        picture(seed=number).save(tmp_path / f"{number}.png")
    images = [tmp_path / f"{number}.png" for number in range(3)]
    code, out, err = run(
        "caption",
        "--checkpoint",
        base,
        "--image",
        *images,
        "--max-tokens",
        4,
        "--batch",
        2,
        "--json",
        capsys=capsys,
    )
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["image"] for row in rows] == [str(path) for path in images] and all(
        isinstance(row["caption"], str) for row in rows
    )
    code, noised, _ = run(
        "caption",
        "--checkpoint",
        base,
        "--image",
        images[0],
        "--max-tokens",
        4,
        "--from-noised",
        0.5,
        "--prompt",
        "a cup",
        capsys=capsys,
    )
    assert code == 0 and noised.startswith(f"{images[0]}: ")


def test_an_opened_model_has_the_weights_of_its_files_and_nothing_that_trains(base):
    opened = open_model(base, dtype=torch.bfloat16)
    assert not any(
        parameter.requires_grad or parameter.is_meta or parameter.dtype != torch.bfloat16
        for parameter in opened.model.parameters()
    )
    assert opened.model.latent_positions.dtype == torch.float32 and isinstance(
        opened.tokenizer, Tokenizer
    )


@pytest.mark.parametrize(
    "words, culprit",
    [
        (["generate"], "--prompt: nothing to draw"),
        (["generate", "--prompts", "absent.txt"], "--prompts: absent.txt cannot be read"),
        (["generate", "--prompt", "x", "--steps", "0"], "--steps: must be at least 1"),
        (["generate", "--prompt", "x", "--text-guidance", "0.5"], "--text-guidance: .*at least 1"),
        (
            ["generate", "--prompt", "x", "--guidance-interval", "1", "0"],
            r"--guidance-interval: must be \[low, high\]",
        ),
        (["generate", "--prompt", "x", "--height", "18"], "--height: .*multiples of 4"),
        (["generate", "--prompt", "x", "--count", "0"], "--count: must be at least 1"),
        (
            ["generate", "--prompt", "x", "--device", "nowhere"],
            "--device: 'nowhere' cannot be used",
        ),
        (["edit", "--image", "a.png"], "--instruction: is missing"),
        (["edit"], "--image: nothing to edit"),
        (
            ["edit", "--image", "absent.png", "--instruction", "x"],
            "--image: absent.png cannot be read",
        ),
        (
            ["edit", "--image", "absent.png", "--instruction", "x", "--height", "16"],
            "--image: absent.png cannot be read",
        ),
        (["caption", "--image", "absent.png"], "--image: absent.png cannot be read"),
        (["caption", "--image", "text.png"], "--image: text.png is not a usable image"),
        (
            ["caption", "--image", "ok.png", "--from-noised", "1.5"],
            "--from-noised: must be a noise level",
        ),
        (
            ["caption", "--image", "ok.png", "--from-noised", "0.5", "--question", "x"],
            "--question: does not go with --from-noised",
        ),
        (["caption", "--image", "ok.png", "--prompt", "x"], "--prompt: goes with --from-noised"),
        (["caption", "--image", "ok.png", "--top-p", "0"], "--top-p: must be greater than 0"),
    ],
)
def test_mistakes_are_one_line_that_names_the_culprit(
    base, tmp_path, capsys, monkeypatch, words, culprit
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    picture().save(tmp_path / "ok.png")
    code, out, err = run(words[0], "--checkpoint", base, *words[1:], capsys=capsys)
    assert code == 2 and out == "" and len(err.splitlines()) == 1, (out, err)
    assert re.match(f"error: {culprit}", err), err


def test_a_checkpoint_that_is_not_there_is_named_and_pictures_are_not_overwritten(
    base, tmp_path, capsys
):
    code, _, err = run(
        "generate",
        "--checkpoint",
        tmp_path / "absent",
        "--prompt",
        "x",
        "--out",
        tmp_path / "out",
        capsys=capsys,
    )
    assert code == 2 and err == f"error: --checkpoint: '{tmp_path / 'absent'}' is not a folder.\n"
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "llm_config.json").write_bytes((base / "llm_config.json").read_bytes())
    code, _, err = run(
        "generate",
        "--checkpoint",
        tmp_path / "half",
        "--prompt",
        "x",
        "--out",
        tmp_path / "out",
        capsys=capsys,
    )
    assert (
        code == 2
        and all(
            name in err
            for name in ("vit_config.json", "ema.safetensors", "a tokenizer", "ae.safetensors")
        )
        and len(err.splitlines()) == 1
    )
    (tmp_path / "out" / "0000.png").write_text("mine")
    code, _, err = run(
        "generate",
        "--checkpoint",
        base,
        "--prompt",
        "x",
        "--out",
        tmp_path / "out",
        "--steps",
        1,
        capsys=capsys,
    )
    assert (
        code == 2
        and "0000.png exists already" in err
        and (tmp_path / "out" / "0000.png").read_text() == "mine"
    )
    assert (
        run(
            "generate",
            "--checkpoint",
            base,
            "--prompt",
            "x",
            "--out",
            tmp_path / "out",
            "--steps",
            1,
            "--overwrite",
            capsys=capsys,
        )[0]
        == 0
    )
    assert metadata(tmp_path / "out" / "0000.png")["prompt"] == "x"


def test_sampling_starts_without_importing_deepspeed():
    code = "import sys, uno_ds.commands.sample; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_backend_is_asked_for_the_heads_of_the_model_before_its_weights_are_read(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    odd = random_base(tmp_path / "odd", hidden=48, heads=2)
    words = ("generate", "--checkpoint", odd, "--prompt", "x", "--out", tmp_path / "out")
    code, out, err = run(*words, "--backend", "triton", capsys=capsys)
    assert (code, out) == (2, "") and "but the model has heads of 24" in err
    assert err.count("\n") == 1
