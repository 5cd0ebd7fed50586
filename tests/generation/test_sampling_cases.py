"""`weights.py verify` replays sampling that the public BAGEL code recorded through the sampler of
the command line, and says what differs."""

import pytest
import torch
from sampling_cases import FOLDER, part, verdicts, verify

# Each renormalisation, both intervals, both shifts, both least factors; no guidance; 49 steps.
SOME_PICTURES = [0, 7, 10, 13, 20, 24, 25]
# Every view with and without a question, of every picture; texts that end early, late and not at
# all.
SOME_TEXTS = [1, 7, 8, 9, 11, 16, 18, 27, 28]


@pytest.mark.parametrize("name, runs", [("t2i", SOME_PICTURES), ("caption", SOME_TEXTS)])
def test_recorded_sampling_of_the_public_code_is_reproduced(name, runs, tmp_path, capsys):
    code, lines, err = verify(part(tmp_path, name, runs), capsys)
    assert (code, err) == (0, "") and not verdicts(lines, "FAIL") and not verdicts(lines, "note")
    for number in range(len(runs)):
        for quantity in ("tokens", "logits") if name == "caption" else ("final latents", "guided"):
            assert any(f"run {number}, " in line and quantity in line for line in lines)
    assert any("special tokens" in line for line in lines)
    assert any(", together: tokens" in line for line in lines) == (name == "caption")


@pytest.mark.slow
@pytest.mark.parametrize("name, runs", [("t2i", 26), ("caption", 30)])
def test_every_run_of_the_recorded_sampling_is_reproduced(name, runs, capsys):
    code, lines, err = verify(FOLDER / f"{name}.json", capsys)
    assert (code, err) == (0, "")
    assert {int(line.split("run ")[1].split(",")[0]) for line in lines if "run " in line} == set(
        range(runs)
    )


def spoil(key: str, add: float):
    def change(_description, tensors):
        tensors[key].view(-1)[3] += add

    return change


def set_in_run(**values):
    def change(description, _tensors):
        description["runs"][0] |= values

    return change


def other_tokens(margin: float):
    """The sixth token, of which no logits are recorded, is another."""

    def change(description, tensors):
        tensors["run0.tokens"][5] += 1
        description["runs"][0]["smallest_margin"] = margin

    return change


@pytest.mark.parametrize(
    "name, run, change, culprit",
    [
        ("t2i", 0, spoil("run0.step1.without_text", 0.1), "velocity without_text"),
        ("t2i", 0, spoil("run0.step2.full", 0.1), "velocity full"),
        ("t2i", 0, spoil("run0.step0.guided", 0.1), "velocity guided"),
        ("t2i", 0, spoil("run0.final", 0.1), "final latents"),
        ("t2i", 0, spoil("run0.step2.guided", float("nan")), "velocity guided"),
        ("t2i", 0, spoil("run0.t", 0.01), "noise levels"),
        ("t2i", 0, set_in_run(branches_per_step=[2] * 10), "branches per step"),
        ("caption", 16, spoil("run0.logits", 0.1), "logits of the first 4 steps"),
        ("caption", 18, other_tokens(margin=0.11), "tokens"),
        ("caption", 16, set_in_run(ended=False), "tokens"),
    ],
)
def test_what_differs_is_named_and_fails(name, run, change, culprit, tmp_path, capsys):
    code, lines, _ = verify(part(tmp_path, name, [run], change), capsys)
    assert code == 1
    assert [line.split(": ")[1] for line in verdicts(lines, "FAIL")] == [culprit]
    assert lines[-1] == "1 quantities beyond the tolerance of 0.0001"


def test_tokens_that_rounding_may_turn_are_reported_as_undecidable(tmp_path, capsys):
    code, lines, _ = verify(part(tmp_path, "caption", [18], other_tokens(margin=1e-5)), capsys)
    assert code == 0
    (note,) = verdicts(lines, "note")
    assert "tokens (undecidable at token 5: the recorded margin is 1.0e-05" in note
    # A wider tolerance lets more of them pass as undecidable, a narrower one fewer.
    path = part(tmp_path, "caption", [18], other_tokens(margin=1e-5))
    code, lines, _ = verify(path, capsys, "--tolerance", "1e-7")
    assert code == 1 and "tokens" in verdicts(lines, "FAIL")[-1]


def test_the_margin_of_a_token_with_recorded_logits_is_taken_from_them(tmp_path, capsys):
    def change(description, tensors):
        tensors["run0.tokens"][1] += 1
        description["runs"][0]["smallest_margin"] = 0.0

    code, lines, _ = verify(part(tmp_path, "caption", [18], change), capsys)
    assert code == 1 and len(verdicts(lines, "FAIL")) == 1


def test_a_run_that_is_expected_to_differ_is_reported_and_not_counted(tmp_path, capsys):
    def change(description, tensors):
        tensors["run0.final"] += 1
        description["runs"][0]["expected_to_differ"] = True

    code, lines, _ = verify(part(tmp_path, "t2i", [0], change), capsys)
    assert code == 0
    final = [line for line in verdicts(lines, "note") if "final latents" in line]
    assert len(final) == 1 and final[0].endswith("(expected to differ, not counted)")


def lacks(key: str):
    def change(description, tensors):
        for place in (description, description["runs"][0], tensors):
            place.pop(key, None)

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d, _: d.update(task="video"), "task must be one of text_to_image, edit, caption"),
        (lambda d, _: d.update(task=["edit"]), "task must be one of text_to_image, edit, caption"),
        (lambda d, _: d.update(format=2), "has format 2 of cases; this version reads format 1."),
        (lambda d, _: d.update(runs=7), "does not follow the format"),
        (lambda d, _: d.update(prompts=[5]), "prompts: must be a list of texts, got [5]."),
        (lacks("prompts"), "lacks its texts: one of prompts, prompt, instructions, "),
        (lacks("runs"), "lacks 'runs'."),
        (lacks("cfg_interval"), "lacks 'cfg_interval'."),
        (lacks("height"), "lacks 'height'."),
        (lacks("noise"), "lacks the tensor noise"),
        (
            lambda d, _: d.update(height=32),
            "noise of shape [24, 64] is not that of 1 x 12 rows of 64 values.",
        ),
        (lambda d, _: d.update(width=97), "height and width must be multiples of 16"),
        (lacks("run0.final"), "lacks the tensor run0.final"),
        (set_in_run(num_timesteps=1), "runs.0.num_timesteps: must be at least 2, got 1."),
        (set_in_run(cfg_renorm_type="local"), "runs.0.renormalise: must be one of global"),
        (set_in_run(cfg_img_scale=2.0), "runs.0.cfg_img_scale: must be 1 without a source image"),
    ],
)
def test_a_case_that_cannot_be_replayed_is_one_line(change, message, tmp_path, capsys):
    def spoiled(description, tensors):
        change(description, tensors)

    path = part(tmp_path, "t2i", [24], spoiled)
    code, _, err = verify(path, capsys)
    assert code == 2 and len(err.splitlines()) == 1
    assert err.startswith(f"error: {path}") and message in err


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("source0.rgb", torch.zeros(112, 112, 3), "source0.rgb must be uint8 [height, width, 3]"),
        (
            "source0.latent",
            torch.zeros(16, 7, 7),
            "source0.latent must be [16, 14, 14] for pixels of 112 x 112, got [16, 7, 7].",
        ),
        ("source0.rgb", None, "lacks the tensor source0.latent_pixels."),
        ("run0.tokens", None, "lacks the tensor run0.tokens."),
    ],
)
def test_a_source_that_cannot_be_shown_is_one_line(name, value, message, tmp_path, capsys):
    def change(_description, tensors):
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    path = part(tmp_path, "caption", [7], change)
    code, _, err = verify(path, capsys)
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith(f"error: {path}: ") and message in err


def test_a_model_that_is_not_there_is_one_line(tmp_path, capsys):
    path = part(tmp_path, "t2i", [24])
    path.write_text(path.read_text().replace(str(FOLDER / "base"), "absent"))
    code, _, err = verify(path, capsys)
    assert code == 2 and len(err.splitlines()) == 1
    assert err.startswith(f"error: {path}: model {tmp_path / 'absent'}: ")


def test_a_text_that_the_tokenizer_reads_otherwise_fails(tmp_path, capsys):
    def change(description, _tensors):
        description["prompt_ids"][0][2] += 1

    code, lines, _ = verify(part(tmp_path, "t2i", [24], change), capsys)
    (failed,) = verdicts(lines, "FAIL")
    assert code == 1 and "token ids of 'two yellow circles and a red square.'" in failed
