"""The figures of an experiment, as PNG bytes."""

import base64
import io
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend is chosen first
from PIL import Image  # noqa: E402  as above

from benchmarks.suite.gain_report import CURVE, LOSSES, PICTURES  # noqa: E402  as above
from benchmarks.suite.gain_results import Found, Measured, means_of  # noqa: E402  as above
from benchmarks.suite.report_page import Figure  # noqa: E402  as above

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
SHOWN = 8


def figures_of(found: Found) -> list[Figure]:
    figures = [
        (CURVE, "Scenes that are wholly right, over steps", _curve(found, by_flops=False)),
        (CURVE, "The same over FLOP of training", _curve(found, by_flops=True)),
    ]
    for loss in ("flow", "caption"):
        png = _losses(found, loss)
        if png is not None:
            figures.append((LOSSES["validation"], f"{loss} loss over the noise level t", png))
    pictures = _pictures(found)
    if pictures is not None:
        figures.append((PICTURES, "The same prompt and noise in each column", pictures))
    return figures


def _pictures(found: Found) -> bytes | None:
    """A line for the base and for each arm's first seed, over prompts that the base gets wrong;
    None without pictures of two of them."""
    experiment = found.experiment
    if found.base is None or "pictures" not in found.base:
        return None
    lines: list[tuple[str, Measured]] = [("base", found.base)]
    for arm in experiment.arms:
        at_end = found.at(arm, experiment.steps_of(arm), "validation")
        lines += [(arm, at_end[seed]) for seed in sorted(at_end)[:1] if "pictures" in at_end[seed]]
    rows = found.base["rows"][: len(found.base["pictures"])]
    wrong = [place for place, row in enumerate(rows) if not row["right"]["all"]][:SHOWN]
    if len(lines) < 2 or not wrong:
        return None
    size = (1.4 * len(wrong), 1.5 * len(lines) + 0.7)
    figure, axes = plt.subplots(len(lines), len(wrong), figsize=size, squeeze=False)
    for line, (title, measured) in zip(axes, lines, strict=True):
        for cell, place in zip(line, wrong, strict=True):
            content = base64.b64decode(measured["pictures"][place])
            cell.imshow(Image.open(io.BytesIO(content)), interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            is_right = measured["rows"][place]["right"]["all"]
            for side in cell.spines.values():
                side.set(color="#228833" if is_right else "#cc3311", linewidth=2)
        line[0].set_ylabel(title, fontsize=8)
    for cell, place in zip(axes[0], wrong, strict=True):
        cell.set_title(textwrap.fill(found.base["texts"][place], 20), fontsize=6)
    return _png(figure)


def _curve(found: Found, by_flops: bool) -> bytes:
    experiment = found.experiment
    figure, axes = plt.subplots(figsize=(7, 4))
    first = experiment.curve_prompts
    for colour, arm in zip(COLOURS, experiment.arms):
        lines: dict[int, dict[int, float]] = {}
        for (name, seed, step, split), entry in sorted(
            found.points.items(), key=lambda p: p[0][:3]
        ):
            if name == arm and split == "validation":
                lines.setdefault(seed, {})[step] = means_of([entry], first)["all"].value
        for seed, line in lines.items():
            places = [_place(found, arm, seed, step, by_flops) for step in line]
            axes.plot(places, list(line.values()), color=colour, alpha=0.3, linewidth=0.8)
        shared = sorted(set.intersection(*map(set, lines.values()))) if lines else []
        means = [sum(line[step] for line in lines.values()) / len(lines) for step in shared]
        seed = next(iter(lines), 0)
        places = [_place(found, arm, seed, step, by_flops) for step in shared]
        axes.plot(places, means, color=colour, marker="o", label=arm)
    if found.base is not None:
        value = means_of([found.base], first)["all"].value
        axes.axhline(value, color="#222222", linestyle=":", label="base")
    axes.set_xlabel("TFLOP" if by_flops else "steps")
    axes.set_ylabel("percent wholly right")
    axes.legend(fontsize=8)
    return _png(figure)


def _place(found: Found, arm: str, seed: int, step: int, by_flops: bool) -> float:
    return sum(found.flops[arm, seed][:step]) / 1e12 if by_flops else step


def _losses(found: Found, loss: str) -> bytes | None:
    """Mean over seeds of every arm at its last step; None without a loss."""
    experiment = found.experiment
    figure, axes = plt.subplots(figsize=(6, 3.5))
    is_empty = True
    base = [found.base] if found.base else []
    entries: list[tuple[str, list[Measured], str]] = [("base", base, "#222222")]
    for colour, arm in zip(COLOURS, experiment.arms):
        at_end = found.at(arm, experiment.steps_of(arm), "validation")
        entries.append((arm, list(at_end.values()), colour))
    for title, measured, colour in entries:
        if not measured:
            continue
        names = [name for name in measured[0]["losses"] if name.startswith(f"{loss}/")]
        times = [float(name.partition("t=")[2]) for name in names]
        means = [sum(e["losses"][name] for e in measured) / len(measured) for name in names]
        axes.plot(times, means, color=colour, marker="o", label=title)
        is_empty = is_empty and not names
    axes.set_xlabel("noise level t")
    axes.set_ylabel(f"{loss} loss")
    axes.legend(fontsize=8)
    png = _png(figure)
    return None if is_empty else png


def _png(figure: plt.Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()
