"""The command line that looks inside models: work in pieces that can be resumed and shared, then
one report."""

import argparse
import functools
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from uno_ds.commands.inspect_flags import (
    LEAST_IMAGES,
    check_numbers,
    inspect_parser,
    layers_of,
    levels_of,
    parts_of,
)
from uno_ds.commands.inspect_judge import ask_judge, judge_from_flags
from uno_ds.commands.inspect_sources import (
    adapters_of,
    choose,
    fingerprint,
    names_of,
    open_source,
    plain_prompts,
    plain_settings,
    prompts_of,
    regression_of,
    shape_of,
)
from uno_ds.commands.runner import one_line_errors
from uno_ds.commands.sample import open_from_flags
from uno_ds.data.text import Tokenizer
from uno_ds.files_on_disk import replace_text
from uno_ds.generation.inference import special_tokens
from uno_ds.inspection.alignment import SPATIAL_MEASURES
from uno_ds.inspection.analysis import results_of, ticks_of
from uno_ds.inspection.collection import Record
from uno_ds.inspection.encoders import Encoder, check_encoder
from uno_ds.inspection.hidden_states import evenly_spaced
from uno_ds.inspection.images import ImageSet, caption_ids, sample_maker
from uno_ds.inspection.page import Section, write_page
from uno_ds.inspection.plan import ENCODER, Plan, pictures_of, work_of
from uno_ds.inspection.probes import check_probes
from uno_ds.inspection.report import Report, write_pictures
from uno_ds.inspection.store import Store
from uno_ds.inspection.subject import Subject, subject_of
from uno_ds.model.architecture import Architecture, packaged
from uno_ds.settings import SettingsError
from uno_ds.training.checkpoint_file import is_checkpoint
from uno_ds.training.checkpoint_file import open_checkpoint as open_manifest
from uno_ds.training.launch_environment import read_launch

WORK, RESULTS = "work", "results.json"
MOST_LAYERS = 4
STOPPED = 130


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = inspect_parser().parse_args(arguments)
    check_numbers(options)
    try:
        Inspection(options).run()
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", file=sys.stderr)
        return STOPPED
    return 0


class Inspection:
    """One call: everything is checked before the first model is opened."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        launch = read_launch(planning=True)
        self.rank, self.ranks = launch.rank, launch.world_size
        if options.device == "auto" and torch.cuda.is_available():
            options.device = f"cuda:{launch.local_rank}"
        self.levels, parts = levels_of(options.t), parts_of(options.only)
        if options.encoder is not None:
            check_encoder(options.encoder)
        shapes = {path: shape_of(path) for path in options.checkpoint}
        self.shape = next(iter(shapes.values()))
        _check_shapes(shapes)
        self.adapters = [
            adapters_of(options, path, number) for number, path in enumerate(options.checkpoint)
        ]
        self.chosen = choose(options, self.shape)
        self.source = open_source(options, self.chosen)
        self.tokenizer = _tokenizer(options.checkpoint[0], options.base)
        self.prompts = prompts_of(options, self.chosen)
        parts = self._possible(parts)
        self.judge = judge_from_flags(options, parts)
        self.images = ImageSet(
            self.source, self.chosen.composition, options.images, self._maker(metaqueries=1)
        )
        if len(self.images) < LEAST_IMAGES:
            raise SettingsError(
                "--data",
                f"'{options.data}' has {len(self.images)} usable rows; at least {LEAST_IMAGES} are "
                "needed.",
            )
        self.plan = self._plan(parts)
        if options.overwrite and self.ranks > 1:
            raise SettingsError(
                "--overwrite",
                "does not go with several ranks, of which one would remove the work of another; "
                f"remove '{options.out / WORK}' yourself.",
            )
        if options.overwrite:
            shutil.rmtree(options.out / WORK, ignore_errors=True)
        self.store = Store(options.out / WORK, self._settings())

    def run(self) -> None:
        """This rank's pieces, and the report if they were the last."""
        started = time.perf_counter()
        self._print_start()
        own = self.plan.pieces()[self.rank :: self.ranks]
        missing = [piece for piece in own if not self.store.has(piece[1])]
        hidden = None if self.rank == 0 else True
        with tqdm(
            total=len(own), initial=len(own) - len(missing), disable=hidden, unit="piece"
        ) as bar:
            for key in dict.fromkeys(key for key, _ in missing):
                names = [name for of_key, name in missing if of_key == key]
                bar.set_description(key)
                if bar.disable and self.rank == 0:
                    print(f"{key}: {len(names)} pieces", flush=True)
                self._compute(key, names, bar)
        if self.rank and not missing:
            # Where everything was there already, one rank reports.
            return
        if not all(self.store.has(name) for _, name in self.plan.pieces()):
            print(
                f"rank {self.rank} of {self.ranks} has done its share; the last one reports",
                flush=True,
            )
            return
        page = self._report()
        print(
            f"written: {page} and {self.options.out / RESULTS}, "
            f"{time.perf_counter() - started:.0f} s"
        )

    def _compute(self, key: str, names: Sequence[str], bar: Any) -> None:
        if key == ENCODER:
            work = self._encoder_work()
        else:
            work = work_of(self.plan, key, self._subject(key), self.images)
        for name in names:
            self.store.write(name, *work[name]())
            bar.update()

    def _subject(self, key: str) -> Subject:
        number = self.plan.keys.index(key)
        added: dict[str, torch.Tensor] = {}
        only_here = {
            "checkpoint": self.options.checkpoint[number],
            "adapter": self.adapters[number],
            "quantise": None,
        }
        options = argparse.Namespace(**vars(self.options) | only_here)
        opened = open_from_flags(options, added)
        regression = regression_of(options.checkpoint, self.adapters[number])
        return subject_of(opened, added, self.chosen.objective, regression)

    def _encoder_work(self) -> Any:
        device = torch.device("cpu" if self.options.device == "auto" else self.options.device)
        encoder = Encoder(self.options.encoder, device)
        chunks = dict(zip(self.plan.features(ENCODER), self.plan.chunks, strict=True))

        def features(chunk: range) -> Record:
            scenes = [self.images.scene(number) for number in chunk]
            return encoder.features(list(self._pictures(chunk)), scenes)

        return {name: functools.partial(features, chunk) for name, chunk in chunks.items()}

    def _pictures(self, numbers: Sequence[int]) -> Any:
        return pictures_of(self.images, numbers, self._maker(metaqueries=1))

    def _maker(self, metaqueries: int) -> Any:
        tokens = special_tokens(self.tokenizer)
        return sample_maker(
            self.chosen.composition, self.shape.geometry, self.tokenizer, tokens, metaqueries
        )

    def _plan(self, parts: tuple[str, ...]) -> Plan:
        options = self.options
        layers = (
            layers_of(options.layers, self.shape.layers)
            if options.layers is not None
            else tuple(evenly_spaced(self.shape.layers, MOST_LAYERS))
        )
        count = len(self.images)
        return Plan(
            keys=names_of(options.checkpoint, self.adapters),
            parts=parts,
            levels=self.levels,
            layers=layers,
            images=count,
            shown=min(options.shown, count),
            batch=options.batch,
            gradient_images=min(options.gradient_images, count),
            most_tokens=options.max_tokens,
            prompts=self.prompts,
            drawing=plain_settings(self.chosen)["drawing"],
            encoder=options.encoder is not None,
        )

    def _possible(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """Without the parts that cannot be made here, each with a line; one that was asked for by
        name is refused."""
        reasons: dict[str, SettingsError] = {}
        if "probes" in parts:
            try:
                check_probes()
            except SettingsError as error:
                reasons["probes"] = error
        if "diagnosis" in parts and not self.prompts:
            reasons["diagnosis"] = SettingsError(
                "--prompts", "is needed for a diagnosis of data that is not an embedded set."
            )
        for part, reason in reasons.items():
            if self.options.only is not None:
                raise reason
            if self.rank == 0:
                print(f"warning: no {part}: {reason}", file=sys.stderr, flush=True)
        return tuple(part for part in parts if part not in reasons)

    def _settings(self) -> dict[str, Any]:
        plan, options = self.plan, self.options
        return {
            "checkpoints": {
                key: [*fingerprint(path, adapters), not options.no_ema]
                for key, path, adapters in zip(
                    plan.keys, options.checkpoint, self.adapters, strict=True
                )
            },
            "data": [options.data, self.source.digest()],
            "images": plan.images,
            "t": list(plan.levels),
            "layers": list(plan.layers),
            "shown": plan.shown,
            "batch": plan.batch,
            "gradient_images": plan.gradient_images,
            "spatial": list(SPATIAL_MEASURES),
            "max_tokens": plan.most_tokens,
            "prompts": plain_prompts(plan.prompts),
            "encoder": str(options.encoder) if options.encoder else None,
            "precision": options.precision,
            **plain_settings(self.chosen),
        }

    def _print_start(self) -> None:
        if self.rank:
            return
        plan = self.plan
        skipped = ", ".join(f"{cause} {count}" for cause, count in self.images.skipped.items())
        print(
            f"{', '.join(plan.keys)}: {plan.images} images of {self.options.data}, t = "
            f"{', '.join(f'{level:g}' for level in plan.levels)}, layers "
            f"{', '.join(map(str, plan.layers))}; {', '.join(plan.parts)}; sizes of "
            f"{self.chosen.origin}" + (f"; skipped rows: {skipped}" if skipped else ""),
            flush=True,
        )

    def _report(self) -> Path:
        plan, out = self.plan, self.options.out
        scenes = [self.images.scene(number) for number in range(plan.images)]
        if "diagnosis" in plan.parts:
            write_pictures(out, plan, self.store)
        verdicts, judged = None, {}
        if self.judge is not None:
            asked = ask_judge(self.judge, plan, self.store, out, self.options.parallel)
            verdicts, judged = asked[0], {"judge": asked[1]}
        with tqdm(total=ticks_of(plan), desc="statistics", disable=None, leave=False) as bar:
            results = results_of(plan, self.store, scenes, bar.update, verdicts) | judged
        pictures = list(self._pictures(range(plan.shown)))
        captions = self._captions()
        report = Report(out, plan, self.store, results, pictures, captions)
        sections = [self._introduction(), *report.sections()]
        settings = json.loads((out / WORK / "settings.json").read_text(encoding="utf-8"))
        text = json.dumps({"settings": settings, **results}, indent=1, allow_nan=False)
        replace_text(out / RESULTS, text + "\n")
        return write_page(out, f"Inside {', '.join(plan.keys)}", sections)

    def _captions(self) -> list[str]:
        maker = self._maker(metaqueries=0)
        samples = self.images.samples(range(min(self.plan.images, 16)), maker)
        ids = [caption_ids(sample) or [] for sample in samples]
        return [self.tokenizer.decode(of_caption) for of_caption in ids]

    def _introduction(self) -> Section:
        plan, chosen = self.plan, self.chosen
        rows = [
            ["images", f"{plan.images} of {self.options.data}, seed {chosen.composition.seed}"],
            ["noise levels t", ", ".join(f"{level:g}" for level in plan.levels)],
            ["layers", f"{', '.join(map(str, plan.layers))} of {self.shape.layers}"],
            [
                "prompts",
                "shown to the generation expert" if chosen.composition.prompts else "left out",
            ],
            ["images of the gradients", str(plan.gradient_images)],
            ["prompts of the diagnosis", str(len(plan.prompts))],
            ["sizes, sampler", chosen.origin],
            *(
                [key, ", with ".join([path, *adapters])]
                for key, path, adapters in zip(
                    plan.keys, self.options.checkpoint, self.adapters, strict=True
                )
            ),
        ]
        return Section(
            "What was looked at",
            [
                "All models see the same images with the same noise. Hidden states are those of "
                "the forward pass of training. results.json holds every number."
            ],
            tables=[("", ["", ""], rows)],
        )


def _check_shapes(shapes: dict[str, Architecture]) -> None:
    """Raises SettingsError if the checkpoints cannot be compared."""
    first, shape = next(iter(shapes.items()))
    for path, other in shapes.items():
        for what in ("geometry", "layers", "hidden"):
            if getattr(other, what) != getattr(shape, what):
                raise SettingsError(
                    "--checkpoint",
                    f"{path} has another {what} than {first}; models of one shape are compared.",
                )


def _tokenizer(path: str, base: Path | None) -> Tokenizer:
    """Raises SettingsError under `--checkpoint`."""
    folder = packaged(path)
    if is_checkpoint(folder):
        manifest = open_manifest(folder, "--checkpoint")[1]
        recorded = Path(manifest["tokenizer"])
        folder = recorded if recorded.is_dir() or base is None else base
    try:
        return Tokenizer(folder)
    except SettingsError as error:
        raise SettingsError("--checkpoint", error.message) from None
