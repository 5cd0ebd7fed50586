"""`weights.py verify` reproduces cases made here, of the kinds that nothing is recorded of, by a
sampler that knows no cache and lays out and computes every sample anew at every step."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sampling_cases import FOLDER, verdicts, verify, write

from uno_ds.objectives.sampling_case import load_sampling_case
from uno_ds.sequence.composition import SpecialTokens
from uno_ds.sequence.packing import Collator
from uno_ds.sequence.segments import Kind, Sample, Segment

CHANNELS = 16


@dataclasses.dataclass
class Plain:
    """A sampler without a cache, on the model of the recorded cases."""

    case = load_sampling_case(FOLDER / "t2i.json")

    def __post_init__(self):
        self.model, self.tokenizer = self.case.opened.model, self.case.opened.tokenizer
        tokenizer = self.tokenizer
        self.tokens = SpecialTokens(
            tokenizer.bos, tokenizer.eos, tokenizer.start_of_image, tokenizer.end_of_image
        )
        self.collate = Collator(self.model.shape.geometry, self.tokens, False, True)

    def segments(self, parts: list) -> list[Segment]:
        """Text ids, ("vit", pixels) and ("clean", grid) in their order; the RoPE id is that of the
        next segment."""
        segments, rope = [], 0
        for part in parts:
            if isinstance(part, list):
                ids = np.array([self.tokens.bos, *part, self.tokens.eos])
                segments.append(Segment(Kind.TEXT, rope + np.arange(len(ids)), token_ids=ids))
                rope += len(ids)
            elif part[0] == "vit":
                grid = part[1].shape[1] // 14, part[1].shape[2] // 14
                ids = np.full(grid[0] * grid[1] + 2, rope)
                segments.append(Segment(Kind.VIT, ids, pixels=part[1], grid=grid))
                rope += 1
            else:
                ids = np.full(part[1][0] * part[1][1] + 2, rope)
                segments.append(
                    Segment(
                        part[0],
                        ids,
                        latent=np.zeros((CHANNELS, 2 * part[1][0], 2 * part[1][1]), np.float32),
                        grid=part[1],
                    )
                )
                rope += 1
        return segments

    @torch.no_grad()
    def velocity(self, parts: list, clean_RC: list, grid: tuple, x_RC: torch.Tensor, t: float):
        """[R, C] of one branch, by the whole forward of training."""
        *context, noised = self.segments([*parts, (Kind.NOISED, grid)])
        noised = dataclasses.replace(noised, timestep=t, noise=np.zeros(x_RC.shape, np.float32))
        batch = self.collate([Sample("", [*context, noised])])
        no_metaqueries = torch.zeros(0, self.model.shape.hidden)
        _, generation, _ = self.model(batch, torch.cat([*clean_RC, x_RC]), no_metaqueries)
        return self.model.llm2vae(generation[-len(x_RC) :])

    def draw(self, run: dict, branches: dict, grid: tuple, x_RC: torch.Tensor) -> dict:
        """What the public code records of one picture: `branches` are (parts, clean rows) by
        name."""
        line = [1 - n / (run["num_timesteps"] - 1) for n in range(run["num_timesteps"])]
        shift = run["timestep_shift"]
        times = [shift * s / (1 + (shift - 1) * s) for s in line]
        recorded, counts = {"t": torch.tensor(times[:-1])}, []
        for step, t in enumerate(times[:-1]):
            inside = run["cfg_interval"][0] < t <= run["cfg_interval"][1]
            names = [name for name in branches if inside or name == "full"]
            v = {name: self.velocity(*branches[name], grid, x_RC, t) for name in names}
            guided = self.guided(run, v)
            counts.append(len(names))
            if step < 2:
                for name, value in (v | {"guided": guided}).items():
                    recorded[f"step{step}.{name}"] = value
            x_RC = x_RC - guided * (t - times[step + 1])
        return recorded | {"final": x_RC, "counts": counts}

    def guided(self, run: dict, v: dict) -> torch.Tensor:
        full, guided = v["full"], v["full"]
        kind, least = run["cfg_renorm_type"], run["cfg_renorm_min"]
        if "without_text" in v:
            guided = v["without_text"] + run["cfg_text_scale"] * (full - v["without_text"])
        if kind == "text_channel" and "without_text" in v:
            guided = guided * (full.norm(dim=1) / guided.norm(dim=1)).clamp(least, 1)[:, None]
        if "without_image" in v:
            guided = v["without_image"] + run["cfg_img_scale"] * (guided - v["without_image"])
        if len(v) > 1 and kind == "channel":
            guided = guided * (full.norm(dim=1) / guided.norm(dim=1)).clamp(least, 1)[:, None]
        if len(v) > 1 and kind == "global":
            guided = guided * (full.norm() / guided.norm()).clamp(least, 1)
        return guided


RUN = {
    "cfg_renorm_type": "text_channel",
    "cfg_interval": [0.0, 1.0],
    "timestep_shift": 3.0,
    "cfg_renorm_min": 0.0,
    "cfg_text_scale": 4.0,
    "cfg_img_scale": 2.0,
    "num_timesteps": 3,
}
EDIT_RUNS = [
    RUN,
    RUN | {"cfg_renorm_type": "global", "cfg_interval": [0.7, 1.0]},
    RUN | {"cfg_renorm_type": "channel", "cfg_renorm_min": 0.7, "timestep_shift": 1.0},
    RUN | {"cfg_text_scale": 1.2, "cfg_img_scale": 1.0},
]
T2I_RUNS = [
    RUN | {"cfg_img_scale": 1.0, "cfg_renorm_type": kind, "cfg_interval": [0.7, 0.9]}
    for kind in ("global", "channel", "text_channel")
]


def special(plain: Plain) -> dict:
    return {
        "bos_token_id": plain.tokens.bos,
        "eos_token_id": plain.tokens.eos,
        "start_of_image": plain.tokens.start_of_image,
        "end_of_image": plain.tokens.end_of_image,
    }


def edit_case(folder: Path, sources: list[dict], size: tuple[int, int] | None, runs: list) -> Path:
    """`sources`: what is recorded of each, with the pixels as the two encoders read them."""
    plain, generator = Plain(), torch.Generator().manual_seed(1)
    texts = ["make it red", "turn the big circle to the left"][: len(sources)]
    ids = [plain.tokenizer.encode(text) for text in texts]
    tensors, runs = {}, copy.deepcopy(runs)
    for number, source in enumerate(sources):
        height, width = source["latent_pixels"].shape[1:]
        latent = torch.randn(CHANNELS, height // 8, width // 8, generator=generator)
        # Patches of 2 x 2, each flattened as (row, column, channel).
        blocks = latent.unfold(1, 2, 2).unfold(2, 2, 2).permute(1, 2, 3, 4, 0)
        clean_RC, clean_grid = blocks.reshape(-1, 4 * CHANNELS), (height // 16, width // 16)
        result = size or (height, width)
        grid = result[0] // 16, result[1] // 16
        noise = torch.randn(grid[0] * grid[1], 4 * CHANNELS, generator=generator)
        image = [(Kind.CLEAN, clean_grid), ("vit", source["vit_pixels"].numpy())]
        for run_number, run in enumerate(runs):
            branches = {"full": ([*image, ids[number]], [clean_RC])}
            if run["cfg_text_scale"] > 1:
                branches["without_text"] = (image, [clean_RC])
            if run["cfg_img_scale"] > 1:
                branches["without_image"] = ([ids[number]], [])
            recorded = plain.draw(run, branches, grid, noise)
            run["branches_per_step"] = recorded.pop("counts")
            for name, value in recorded.items():
                tensors[f"run{run_number}.picture{number}.{name}"] = value
        tensors |= {f"noise{number}": noise, f"source{number}.latent": latent}
        names = ["rgb"] if "rgb" in source else ["latent_pixels", "vit_pixels"]
        tensors |= {f"source{number}.{name}": source[name] for name in names}
    description = {
        "special_tokens": special(plain),
        "task": "edit",
        "instructions": texts,
        "instruction_ids": ids,
        "runs": runs,
    }
    if size is not None:
        description |= {"height": size[0], "width": size[1]}
    return write(folder, "edit", description, tensors)


def rgb_source(seed: int) -> dict:
    """112 x 112, which neither encoder resizes."""
    rgb = torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    )
    pixels = rgb.float().permute(2, 0, 1) / 127.5 - 1
    return {"rgb": rgb, "latent_pixels": pixels, "vit_pixels": pixels}


def test_edits_of_two_sources_are_replayed_one_by_one_and_together(tmp_path, capsys):
    path = edit_case(tmp_path, [rgb_source(0), rgb_source(1)], None, EDIT_RUNS)
    code, lines, err = verify(path, capsys)
    assert (code, err) == (0, ""), verdicts(lines, "FAIL")
    for run in range(len(EDIT_RUNS)):
        for picture in (0, 1):
            for way in ("one by one", "together"):
                label = f"run {run}, picture {picture}, {way}: "
                found = {line.split(": ")[1] for line in lines if label in line}
                wanted = {"noise levels", "branches per step", "velocity full", "velocity guided"}
                wanted |= {"velocity without_text", "final latents"}
                assert found == wanted | ({"velocity without_image"} if run != 3 else set())


def test_one_instruction_serves_every_source(tmp_path, capsys):
    path = edit_case(tmp_path, [rgb_source(0)], None, EDIT_RUNS[:1])
    description = json.loads(path.read_text())
    description |= {
        "instruction": description.pop("instructions")[0],
        "instruction_ids": description["instruction_ids"][0],
    }
    tensors = load_file(path.with_suffix(".safetensors"))
    for name in list(tensors):
        other = name.replace("picture0", "picture1").replace("source0", "source1")
        tensors[other.replace("noise0", "noise1")] = tensors[name]
    code, lines, err = verify(write(tmp_path, "edit", description, tensors), capsys)
    assert (code, err) == (0, ""), verdicts(lines, "FAIL")
    assert sum("final latents" in line for line in lines) == 4
    description["instructions"] = ["one", "two", "three"]
    code, _, err = verify(write(tmp_path, "edit", description, tensors), capsys)
    assert code == 2 and err.endswith(": instructions: has 3 text(s) for 2 source(s).\n")


def test_a_source_that_is_recorded_as_its_two_views_is_edited_at_another_size(tmp_path, capsys):
    generator = torch.Generator().manual_seed(2)
    source = {
        name: torch.rand(3, height, width, generator=generator) * 2 - 1
        for name, height, width in (("latent_pixels", 64, 128), ("vit_pixels", 56, 112))
    }
    path = edit_case(tmp_path, [source], (96, 48), EDIT_RUNS[:2])
    code, lines, err = verify(path, capsys)
    assert (code, err) == (0, ""), verdicts(lines, "FAIL")
    assert not any("together" in line for line in lines)
    # What a text-to-image case cannot show: the velocity depends on both views.
    for name in ("latent", "vit_pixels"):
        tensors = load_file(path.with_suffix(".safetensors"))
        tensors[f"source0.{name}"] += 0.5
        save_file(tensors, path.with_suffix(".safetensors"))
        code, lines, _ = verify(path, capsys)
        assert code == 1 and any("velocity full" in line for line in verdicts(lines, "FAIL"))
        tensors[f"source0.{name}"] -= 0.5
        save_file(tensors, path.with_suffix(".safetensors"))


@pytest.mark.parametrize("batched", [True, False])
def test_two_prompts_are_replayed_one_by_one_and_together(batched, tmp_path, capsys):
    """Recorded in a batch, rows behind rows, where the norm of a picture is its own; else one
    picture at a time."""
    plain, generator = Plain(), torch.Generator().manual_seed(3)
    texts = ["a red circle.", "two yellow squares and a blue triangle."]
    ids = [plain.tokenizer.encode(text) for text in texts]
    noise = torch.randn(2, 24, 4 * CHANNELS, generator=generator)
    tensors, runs = {"noise": noise.flatten(0, 1) if batched else noise}, copy.deepcopy(T2I_RUNS)
    for number, run in enumerate(runs):
        pictures = [
            plain.draw(run, {"full": ([one], []), "without_text": ([], [])}, (4, 6), x)
            for one, x in zip(ids, noise, strict=True)
        ]
        run["branches_per_step"] = [picture.pop("counts") for picture in pictures][0]
        for name in pictures[0]:
            if batched and run["cfg_renorm_type"] != "global":
                both = torch.cat([picture[name] for picture in pictures])
                tensors[f"run{number}.{name}"] = pictures[0]["t"] if name == "t" else both
            else:
                for place, picture in enumerate(pictures):
                    tensors[f"run{number}.picture{place}.{name}"] = picture[name]
    description = {
        "special_tokens": special(plain),
        "task": "text_to_image",
        "prompts": texts,
        "prompt_ids": ids,
        "height": 64,
        "width": 96,
        "runs": runs,
    }
    path = write(tmp_path, "t2i_two", description, tensors)
    code, lines, err = verify(path, capsys)
    assert (code, err) == (0, ""), verdicts(lines, "FAIL")
    finals = [line for line in lines if "final latents" in line]
    assert len(finals) == 3 * 2 * 2 and sum("together" in line for line in finals) == 6
    # The second picture is not compared with the first one's numbers.
    key = "run1.final" if batched else "run1.picture1.final"
    tensors[key] = tensors[key].clone()
    tensors[key][-1] += 0.1
    code, lines, _ = verify(write(tmp_path, "t2i_two", description, tensors), capsys)
    failed = [line.split("relative")[1].split(maxsplit=1)[1] for line in verdicts(lines, "FAIL")]
    assert code == 1 and failed == [
        f"run 1, picture 1, {way}: final latents" for way in ("one by one", "together")
    ]
