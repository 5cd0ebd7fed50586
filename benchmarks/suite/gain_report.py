"""The page of an experiment: verdicts, tables and curves, from what was measured."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from benchmarks.suite.gain_experiment import SPLITS
from benchmarks.suite.gain_results import (
    EQUAL_FLOP,
    Found,
    Measured,
    comparisons,
    contents_of,
    gaps_of,
    means_of,
)
from benchmarks.suite.gain_statistics import Comparison
from benchmarks.suite.report_blocks import Block, Line, Section, Table
from benchmarks.suite.report_page import Figure, write_page
from benchmarks.suite.results import shown_path
from uno_ds.evaluation.benchmarks.scenes import ASPECTS
from uno_ds.evaluation.table import Estimate

CURVE = "Learning curves"
LOSSES = {split: f"Losses of held-out scenes, {split} contents" for split in SPLITS}
ALIGNMENT = {split: f"Alignment with the visual encoder, {split} contents" for split in SPLITS}
READS = "Captions that the understanding expert reads wholly right"
PICTURES = "Prompts that the base gets wrong"
LIMITS = (
    "Scenes of coloured shapes at 32 x 32 pixels and a model of a few million parameters: a "
    "difference here need not be one for photographs and BAGEL-7B, and the other way round.",
    "Intervals are of 95 %, each by itself: of twenty comparisons without a difference one is "
    "expected to show one.",
    "FLOP are those of the cost model, counted over the packs that each run trained on; they are "
    "not seconds.",
)


def write_gain_report(folder: Path, found: Found, command: str, notes: Sequence[str]) -> None:
    """report.html, report.md and figures/ in `folder`."""
    sections = _sections(found, command, notes)
    figures: list[Figure] = []
    try:
        from benchmarks.suite.gain_plots import figures_of

        titles = {title for title, _ in sections}
        figures = [figure for figure in figures_of(found) if figure[0] in titles]
    except ImportError as error:
        sections[0][1].append(Line(f"There are no figures: {error}.", "warning"))
    write_page(folder, sections, figures)


def verdicts(found: Found) -> list[str]:
    """One sentence for each comparison; those on the test prompts first, where there are any."""
    lines = []
    for split in ("test", "validation"):
        for result in comparisons(found, split):
            lines.append(f"On {split} prompts: {result.verdict}")
    return lines


def _sections(found: Found, command: str, notes: Sequence[str]) -> list[Section]:
    experiment = found.experiment
    headline: list[Block] = [Line(line, "headline") for line in verdicts(found)]
    if not headline:
        headline = [Line("Nothing can be compared yet.", "warning")]
    sections: list[Section] = [(f"Does supervision help? {experiment.name}", headline)]
    sections.append(("Set-up", _set_up(found)))
    for split in SPLITS:
        for result in comparisons(found, split):
            title = f"{result.arm} against {experiment.baseline} {result.at}, {split} prompts"
            sections.append((title, _comparison(result)))
        table = _scores(found, split)
        if table.rows:
            sections.append((f"Scenes that are right, {split} prompts", [table]))
    sections.append((CURVE, [Line("Validation prompts; thin lines are single runs.")]))
    if found.base is not None and "pictures" in found.base:
        text = (
            "Green: wholly right. Validation prompts, the first seed of each arm at its last step."
        )
        sections.append((PICTURES, [Line(text)]))
    for split in SPLITS:
        if not any("losses" in e for (*_, of), e in found.points.items() if of == split):
            continue
        about = "below 0 is better"
        sections.append((LOSSES[split], _differences(found, "losses", split, about)))
        about = (
            "CKNNA of the generation expert's hidden states with the model's own visual encoder of "
            "the clean image, both averaged over the image; above 0 is more alike"
        )
        sections.append((ALIGNMENT[split], _differences(found, "alignment", split, about)))
    for split in SPLITS:
        reads = _reads(found, split)
        if reads.rows:
            sections.append((f"{READS}, {split} contents", [reads]))
    sections.append(("Cost", [_cost(found)]))
    sections.append(("What this cannot show", [Line(text) for text in (*LIMITS, *notes)]))
    sections.append(("How to repeat it", [Line(command)]))
    return sections


def _set_up(found: Found) -> list[Block]:
    experiment = found.experiment
    rows = []
    for arm, given in experiment.arms.items():
        steps = experiment.steps_of(arm)
        measured = len(found.at(arm, steps, "validation"))
        runs = f"{measured} of {len(experiment.seeds_of(arm))}"
        rows.append([arm, runs, f"{steps:,}", ", ".join(given)])
    kinds = ", ".join(experiment.kinds)
    contents = ", ".join(
        f"{split} {len(set(names))}" for split, names in contents_of(found).items() if names
    )
    text = (
        f"Recipe {shown_path(experiment.recipe)}. Arms with one seed share the order of the data, "
        f"noise and noise levels. {experiment.prompts} prompts of either set ({kinds}), of few "
        f"contents ({contents or 'none measured'}), which intervals over prompts are drawn from. "
        "No training scene of the arms has one of them, and the sets have none in common. Pictures "
        "are drawn with the moving average of the weights, and judged by a program."
    )
    return [Line(text), Table(["arm", "runs measured", "steps", "settings"], rows)]


def _comparison(result: Comparison) -> list[Block]:
    rows = []
    # Whole scenes first, then each aspect, by kind.
    names = sorted(result.over_prompts, key=lambda name: (not name.startswith("all"), name))
    for name in names:
        seeds, prompts = result.over_seeds[name], result.over_prompts[name]
        rows.append([name, interval_text(seeds, signed=True), interval_text(prompts, True)])
    by_seed = ", ".join(f"{value:+.1f}" for value in result.by_seed)
    return [
        Line(result.verdict),
        Line(f"Differences of `all` by seed: {by_seed} points."),
        Table(["right", "points, over seeds", "points, over prompts"], rows),
    ]


def _scores(found: Found, split: str) -> Table:
    kinds = list(found.experiment.kinds)
    if len(kinds) == 1:
        kinds = []  # the same as all of them
    columns = ["all", *(f"all, {kind}" for kind in kinds), *ASPECTS[1:]]
    rows = []
    if found.base is not None and split == "validation":
        rows.append(_row("base", means_of([found.base]), columns))
    for arm, title, measured in _runs_at_end(found, split):
        rows.append(_row(f"{arm}, {title}", means_of(measured), columns))
    return Table(["percent", *columns], rows)


def _runs_at_end(found: Found, split: str) -> Iterator[tuple[str, str, list[Measured]]]:
    """(arm, words for where, measurements over seeds)"""
    experiment = found.experiment
    for arm in experiment.arms:
        at_end = list(found.at(arm, experiment.steps_of(arm), split).values())
        if at_end:
            yield arm, f"{experiment.steps_of(arm):,} steps, {len(at_end)} seed(s)", at_end
    for arm in experiment.arms:
        beyond = list(found.beyond(arm, split).values())
        if beyond:
            steps = sorted({entry["step"] for entry in beyond})
            words = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
            yield experiment.baseline, f"{words} steps, the cost of {arm}", beyond


def _row(title: str, means: dict[str, Estimate], columns: Sequence[str]) -> list[str]:
    return [title, *(interval_text(means[name]) if name in means else "-" for name in columns)]


def _differences(found: Found, values_of: str, split: str, about: str) -> list[Block]:
    blocks: list[Block] = []
    for beyond, at in ((False, "at the last steps"), (True, EQUAL_FLOP)):
        gaps = gaps_of(found, values_of, split, beyond)
        names = list(dict.fromkeys(chain.from_iterable(gaps.values())))
        rows = []
        for arm, gap in gaps.items():
            cells = [f"{gap[name].value:+.4f} {_between(gap[name], 4)}" for name in names]
            rows.append([arm, *cells])
        if rows:
            text = f"Difference to {found.experiment.baseline} {at}, over seeds; {about}."
            blocks += [Line(text), Table(["arm", *names], rows)]
    return blocks


def _reads(found: Found, split: str) -> Table:
    entries: list[tuple[str, list[Measured]]] = []
    if found.base is not None and split == "validation":
        entries.append(("base", [found.base]))
    for arm, title, measured in _runs_at_end(found, split):
        entries.append((f"{arm}, {title}", measured))
    rows: list[list[str]] = []
    head: list[str] = []
    for title, measured in entries:
        read = measured[0].get("captions_right", {})
        head = []
        cells = []
        for what, kinds in read.items():
            for kind in kinds:
                head.append(f"{what}, {kind}")
                shares = [entry["captions_right"][what][kind] for entry in measured]
                cells.append(f"{100 * sum(shares) / len(shares):.0f}")
        rows.append([title, *cells])
    return Table(["percent", *head], rows)


def _cost(found: Found) -> Table:
    experiment = found.experiment
    rows = []
    for arm in experiment.arms:
        runs = [flops for (name, _), flops in found.flops.items() if name == arm and flops]
        if not runs:
            continue
        steps = [flops[: experiment.steps_of(arm)] for flops in runs]
        each = sum(map(sum, steps)) / sum(map(len, steps))
        rows.append([arm, f"{each / 1e9:.2f}", str(sum(map(len, runs)))])
    return Table(["arm", "GFLOP a step", "steps trained, all seeds"], rows)


def interval_text(estimate: Estimate, signed: bool = False) -> str:
    value = f"{estimate.value:+.1f}" if signed else f"{estimate.value:.1f}"
    return f"{value} {_between(estimate, 1)}".strip()


def _between(estimate: Estimate, digits: int) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"[{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
