"""Evaluation during a run: held-out losses, a benchmark that a program scores, and pictures."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from uno_ds.data.sources import SourceSettings
from uno_ds.evaluation.benchmarks.scenes import Scenes
from uno_ds.evaluation.table import Row, Table
from uno_ds.generation.inference import SampleSettings, generate
from uno_ds.generation.sampler import noise_of_seeds
from uno_ds.settings import SettingsError, setting
from uno_ds.training.collectives import gather_objects
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine
from uno_ds.training.held_out import HeldOutLosses
from uno_ds.training.metrics import Metrics
from uno_ds.training.pictures import sample_grid
from uno_ds.training.run_files import print_line

if TYPE_CHECKING:
    from uno_ds.data.text import Tokenizer

FOLDER = "evaluations"
MOST_LINES = 12  # steps in the picture of pictures over time
SCORED_BY_PROGRAM = ("scenes",)
TRAINED, AVERAGE = "trained", "average"


@dataclass(frozen=True)
class EvaluateSettings:
    every: int = setting(
        0,
        doc="Steps between two evaluations in the run; also before the first step and after the "
        "last. 0: none.",
        minimum=0,
        maximum=10**9,
    )
    weights: str | None = setting(
        None,
        choices=(TRAINED, AVERAGE),
        doc="Which weights are evaluated: the trained ones, or their moving average, which is what "
        "an export holds. null: the average where optimizer.ema is on.",
    )
    benchmarks: list[str] = setting(
        factory=list,
        choices=SCORED_BY_PROGRAM,
        doc="Benchmarks that are drawn and scored: scenes. Pictures are drawn with the settings of "
        "`samples`.",
    )
    prompts: int = setting(
        32, doc="Prompts of a benchmark: the first ones.", minimum=1, maximum=100_000
    )
    batch: int = setting(8, doc="Pictures that a rank draws together.", minimum=1, maximum=10_000)
    sources: list[SourceSettings] = setting(
        factory=list,
        doc="Held-out rows whose losses are computed; as data.sources, weights have no effect.",
    )
    rows: int = setting(
        64, doc="Rows of each held-out source, evenly spaced over it.", minimum=1, maximum=10**6
    )
    times: list[float] = setting(
        factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9],
        doc="Noise levels at which the losses of held-out rows are computed.",
        minimum=0,
        maximum=1,
    )
    seed: int = setting(
        0, doc="Seed of the held-out rows' noise and captions.", minimum=0, maximum=2**32 - 1
    )

    def __post_init__(self) -> None:
        if self.sources and not self.times:
            raise SettingsError("times", "must name at least one noise level.")
        for name in ("benchmarks", "times"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise SettingsError(name, f"names one of {given} twice.")

    def uses_average(self, ema: float) -> bool:
        """Whether the moving average is evaluated. `ema`: its decay. Raises SettingsError if it is
        asked for and there is none."""
        if self.weights is None:
            return ema > 0
        is_asked_for = {TRAINED: False, AVERAGE: True}[self.weights]
        if is_asked_for and not ema:
            raise SettingsError(
                "evaluate.weights",
                "is average, but optimizer.ema is 0, so that there is none; set optimizer.ema, or "
                "evaluate.weights=trained.",
            )
        return is_asked_for

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to evaluate, but for pictures."""
        return not self.benchmarks and not self.sources


class Drawing(NamedTuple):
    """A picture to draw: its place in the list of all, prompt and seed."""

    place: int
    prompt: str
    seed: int


class Evaluation:
    """What a run evaluates every `evaluate.every` steps. Results are lines of evaluations.jsonl,
    scalars and images of TensorBoard, and evaluations/step_N/ with the pictures."""

    def __init__(
        self,
        settings: EvaluateSettings,
        samples: SampleSettings,
        engine: Engine,
        tokenizer: "Tokenizer",
        held_out: HeldOutLosses | None,
        folder: Path,
        beat: Callable[[str], None],
        average: Ema | None,
    ):
        """`average`: evaluated in place of the trained weights, if there is one."""
        self.average = average
        self.settings, self.samples, self.engine = settings, samples, engine
        self.tokenizer, self.held_out, self.folder, self._beat = tokenizer, held_out, folder, beat
        self._scenes = Scenes()
        wanted = settings.prompts if "scenes" in settings.benchmarks else 0
        self._items = self._scenes.first_items(wanted) if wanted else []

    def is_due(self, step: int, last: int) -> bool:
        """Before the first step, every so many steps, and after the last."""
        every = self.settings.every
        return every > 0 and (step % every == 0 or step == last)

    def __call__(self, step: int, metrics: Metrics) -> None:
        """Evaluates and records. Collective."""
        with self.average.in_use() if self.average is not None else nullcontext():
            values = self.held_out(self.engine) if self.held_out is not None else {}
            self._beat(f"in the evaluation after step {step}")
            pictures = self._pictures()
        shown = pictures[: len(self.samples.prompts)]
        rows = [
            self._scenes.row(item, picture)
            for item, picture in zip(self._items, pictures[len(shown) :], strict=True)
        ]
        values |= scene_values(rows, self._scenes)
        if self.engine.rank == 0:
            shown = shown or pictures[:8]
            weights = TRAINED if self.average is None else AVERAGE
            metrics.evaluation(step, values, [_png(picture) for picture in shown], weights)
            self._write(step, shown)

    def _pictures(self) -> list[Image.Image]:
        """The pictures of the recipe's prompts and of the benchmark's, on every rank. Each is drawn
        by one rank; under ZeRO-3 all draw equally many, so some draw one that is not used."""
        drawings = self._drawings()
        rank, world_size = self.engine.rank, self.engine.world_size
        own = drawings[rank::world_size]
        share = -(-len(drawings) // world_size)
        own += drawings[: share - len(own)]
        found: dict[int, bytes] = {}
        for start in range(0, len(own), self.settings.batch):
            part = own[start : start + self.settings.batch]
            for drawing, picture in zip(part, self._draw(part), strict=True):
                found[drawing.place] = _png(picture)
        of_all_ranks: dict[int, bytes] = {}
        for of_rank in gather_objects(found):
            of_all_ranks |= of_rank
        return [Image.open(io.BytesIO(of_all_ranks[place])) for place in range(len(drawings))]

    def _drawings(self) -> list[Drawing]:
        first = [
            (prompt, self.samples.seed + place) for place, prompt in enumerate(self.samples.prompts)
        ]
        seeds = [seeds[0] for seeds in self._scenes.seeds(self._items)]
        scenes = [(item.prompt, seed) for item, seed in zip(self._items, seeds, strict=True)]
        return [Drawing(place, *entry) for place, entry in enumerate([*first, *scenes])]

    def _draw(self, part: Sequence[Drawing]) -> list[Image.Image]:
        objective = self.engine.objective
        model = objective.model
        settings = dataclasses.replace(self.samples, prompts=[drawing.prompt for drawing in part])
        stride = model.shape.geometry.latent_stride
        cells = (settings.height // stride) * (settings.width // stride)
        seeds = [drawing.seed for drawing in part]
        noise_BGC = noise_of_seeds(seeds, (cells, model.shape.latent_values))

        def observe(number: int, t: float, *velocities: object) -> None:
            self._beat(f"in an evaluation, at sampling step {number}")

        return generate(model, objective.codec, self.tokenizer, settings, None, noise_BGC, observe)

    def _write(self, step: int, pictures: Sequence[Image.Image]) -> None:
        """Keeps the pictures of this step, and draws those of all steps. What a disk does not take
        is a warning: an evaluation ends no run."""
        if not pictures:
            return
        folder = self.folder / FOLDER / f"step_{step}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(pictures):
                picture.save(folder / f"{number:04d}.png")
            prompts = [drawing.prompt for drawing in self._drawings()[: len(pictures)]]
            lines = [
                (f"step {kept}", _kept(path, len(prompts))) for kept, path in self._steps(step)
            ]
            sample_grid(lines, prompts, self.folder / f"{FOLDER}.png")
        except OSError as error:
            print_line(f"WARNING: pictures of the evaluation are lost: {error.strerror or error}")

    def _steps(self, last: int) -> list[tuple[int, Path]]:
        """(step, folder) of at most MOST_LINES evaluations up to `last`, evenly spaced."""
        found = {}
        for path in (self.folder / FOLDER).glob("step_*"):
            number = path.name.removeprefix("step_")
            if number.isdigit() and int(number) <= last:
                found[int(number)] = path
        steps = sorted(found)
        if len(steps) > MOST_LINES:
            places = [round(n * (len(steps) - 1) / (MOST_LINES - 1)) for n in range(MOST_LINES)]
            steps = [steps[place] for place in places]
        return [(step, found[step]) for step in steps]


def scene_values(rows: Sequence[Row], scenes: Scenes) -> dict[str, float]:
    """{"scenes/ASPECT": percent}; empty without rows."""
    if not rows:
        return {}
    table = Table(rows, scenes.headlines(rows))
    means = table.means()[0].tolist()
    return {f"scenes/{name}": mean for name, mean in zip(table.names(), means, strict=True)}


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _kept(folder: Path, count: int) -> list[Image.Image | None]:
    """The pictures of a step; None for one that cannot be read."""
    found: list[Image.Image | None] = []
    for number in range(count):
        try:
            found.append(Image.open(folder / f"{number:04d}.png").convert("RGB"))
        except OSError:
            found.append(None)
    return found
