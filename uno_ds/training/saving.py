"""Writing the checkpoints of a run, at once or in the background while training continues.

All ranks write into a partial folder, each its own pieces; when every file is on the disk and seen
from another rank, the folder is renamed into place, then `latest` is. Frozen weights are not
written: they are those of the base, whose hashes are."""

import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from uno_ds.files_on_disk import replace_text
from uno_ds.model.tensor_file import new_digest, sync_folder, write_tensors
from uno_ds.settings import SettingsError, to_plain
from uno_ds.training.checkpoint import CheckpointSettings
from uno_ds.training.checkpoint_file import (
    AVERAGE,
    MOMENTS,
    WEIGHT,
    complete_checkpoints,
    leftovers,
    mark_doubt,
    part_of,
    place_finished_parts,
    point_latest_at,
    rank_file,
)
from uno_ds.training.collectives import gather_objects, raise_on_all_ranks
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine, StepResult
from uno_ds.training.manifest import FORMAT, MANIFEST, digest_of_manifest
from uno_ds.training.retention import Retention
from uno_ds.training.shards import TrainedState, shape_of

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
# Name, bytes and hash of the file that a rank has written.
Record = tuple[str, int, str]


class Saver:
    """Writes checkpoints below `folder`. `save` and `settle` are collective.

    A save that fails on any rank, on a full disk for one, fails on all: what it wrote is removed,
    the checkpoints before it stay, a line goes to `report`, and `failed` counts it. `beat` is
    called when a part of the work is done."""

    def __init__(
        self,
        folder: Path,
        settings: CheckpointSettings,
        engine: Engine,
        ema: Ema | None,
        report: Callable[[str], None] = print,
        beat: Callable[[str], None] = lambda where: None,
    ):
        self.folder, self.settings = folder, settings
        self.engine, self.ema = engine, ema
        self._report, self._beat = report, beat
        self.saved = self.failed = 0
        self.blocked_seconds: list[float] = []
        self.retention = Retention(folder, settings, engine.recipe.health.spike_factor, report)
        self._pending: _Writing | None = None
        self._host: torch.Tensor | None = None

    def observe(self, step: int, result: StepResult) -> None:
        """Judges the checkpoints by a step that follows them."""
        if self.engine.rank == 0:
            self.retention.observe(step, float(result.loss_on_host), result.skipped)

    def save(
        self, step: int, lanes: dict[str, Any], progress: dict[str, Any], *, wait: bool = False
    ) -> bool:
        """Checkpoint `step`; `lanes`: stream positions of this rank's lanes. False if it failed.

        In the background (`checkpoint.asynchronous`, without `wait`) it returns once the values are
        copied to the host's memory; `settle` has to be called later, by all ranks at the same step,
        and says how it went."""
        self.settle()
        begun = time.perf_counter()
        self._beat(f"saving step {step}")
        try:
            self._pending = self._begin(
                step, lanes, progress, background=self.settings.asynchronous and not wait
            )
        except SettingsError as error:
            self._report_failure(step, error)
        is_done = self._pending is not None
        if self._pending is not None and not self._pending.in_background:
            is_done = self.settle()
        self.blocked_seconds.append(time.perf_counter() - begun)
        return is_done

    @property
    def ready(self) -> bool:
        """Whether this rank has written its part of a save in the background."""
        return self._pending is not None and self._pending.finished

    def settle(self) -> bool:
        """Waits for the save in the background, if there is one, and puts it in place. False if it
        failed."""
        writing, self._pending = self._pending, None
        if writing is None:
            return True
        writing.wait(self._beat)
        try:
            self._put_in_place(writing)
        except SettingsError as error:
            self._report_failure(writing.step, error)
            return False
        self.saved += 1
        if self.engine.rank == 0:
            self.retention.placed(writing.final)
        return True

    def _begin(
        self, step: int, lanes: dict[str, Any], progress: dict[str, Any], background: bool
    ) -> "_Writing":
        final, engine = self.folder / f"step_{step}", self.engine
        with raise_on_all_ranks():
            if engine.rank == 0:
                place_finished_parts(self.folder)
                for left in leftovers(self.folder):
                    shutil.rmtree(left)
                part_of(final).mkdir(parents=True)
        state = TrainedState(engine)
        layout, values = self._pieces(state)
        own_bytes = sum(4 * math.prod(shape) for _, shape in layout.values())
        needed = sum(gather_objects(own_bytes))
        with raise_on_all_ranks():
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise SettingsError(
                    str(self.folder),
                    f"has {free:,} bytes left, and the checkpoint takes {needed:,}.",
                )
        manifest = {
            "format": FORMAT,
            "step": step,
            "optimizer_steps": state.updates,
            "world_size": engine.world_size,
            "stage": engine.stage,
            "ema_updates": self.ema.updates if self.ema else None,
            "optimizer": {
                key: engine.optimizer.param_groups[0][key]
                for key in ("lr", "betas", "eps", "weight_decay")
            },
            "base": str(engine.recipe.base.resolve()) if engine.recipe.base else None,
            "frozen": engine.frozen_hashes,
            "tokenizer": str(engine.recipe.tokenizer_folder.resolve()),
            "architecture": to_plain(engine.recipe.architecture),
            "lora": to_plain(engine.recipe.lora) if engine.recipe.model.train == "lora" else None,
            **progress,
            "shapes": {
                name: list(shape_of(parameter)) for name, parameter in state.parameters.items()
            },
        }
        file = part_of(final) / rank_file(engine.rank) if layout else None
        starts = {name: piece.start for name, piece in state.pieces.items()}
        if background:
            values = self._copied_to_host(layout, values)
        writing = _Writing(
            step, final, manifest, lanes, file, layout, starts, in_background=background
        )
        writing.start(values, self._beat)
        return writing

    def _pieces(self, state: TrainedState) -> tuple[Layout, Iterable[torch.Tensor]]:
        """What this rank owns and no other does, and its values one at a time."""
        if not state.pieces or self.engine.stage == 0 and self.engine.rank:
            return {}, ()
        readers: dict[str, Callable[[str, str], torch.Tensor]] = {
            kind: state.read for kind in (WEIGHT, *(MOMENTS if state.updates else ()))
        }
        if self.ema is not None:
            readers[AVERAGE] = lambda kind, name: self.ema.shards[name][: state.pieces[name].count]
        layout = {
            f"{kind}/{name}": (torch.float32, (piece.count,))
            for kind in readers
            for name, piece in state.pieces.items()
        }
        return layout, (read(kind, name) for kind, read in readers.items() for name in state.pieces)

    def _copied_to_host(self, layout: Layout, values: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """The values in one buffer of the host, which is kept for the next save: pinned pages are
        slow to get."""
        on_gpu = self.engine.device.type == "cuda"
        counts = [math.prod(shape) for _, shape in layout.values()]
        if self._host is None or len(self._host) != sum(counts):
            self._host = torch.empty(sum(counts), pin_memory=on_gpu)
        copies = list(self._host.split(counts))
        for copy, value in zip(copies, values, strict=True):
            copy.copy_(value, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _put_in_place(self, writing: "_Writing") -> None:
        """Collective; raises SettingsError on every rank if one could not write."""
        with raise_on_all_ranks():
            if writing.error is not None:
                raise writing.error
        parts = gather_objects((writing.record, writing.lanes))
        partial = part_of(writing.final)
        with raise_on_all_ranks():
            neighbour, _ = parts[(self.engine.rank + 1) % len(parts)]
            if neighbour is not None:
                self._check_shared(partial, neighbour)
        with raise_on_all_ranks():
            if self.engine.rank == 0:
                _write_manifest(partial, writing.manifest, parts)
                self._mark_if_in_doubt(partial, writing.final)
                sync_folder(partial)
                _rename_over(partial, writing.final)
                sync_folder(self.folder)
                point_latest_at(writing.final)

    def _check_shared(self, partial: Path, record: Record) -> None:
        """What one rank wrote has to be seen from another machine, or the folder is not shared."""
        name, size, _ = record
        path = partial / name
        if not path.is_file() or path.stat().st_size != size:
            raise SettingsError(
                str(path),
                f"was written by its rank but is not seen by rank {self.engine.rank}; all machines "
                "have to share the run's folder.",
            )

    def _mark_if_in_doubt(self, partial: Path, final: Path) -> None:
        doubt = self.retention.doubt
        if doubt is None:
            return
        mark_doubt(partial, doubt)
        self._report(
            f"warning: {final.name} is saved in doubt: {doubt}. --resume auto prefers one from "
            "before."
        )

    def _report_failure(self, step: int, error: SettingsError) -> None:
        self.failed += 1
        if self.engine.rank == 0:
            shutil.rmtree(part_of(self.folder / f"step_{step}"), ignore_errors=True)
            there = complete_checkpoints(self.folder)
            self._report(
                f"WARNING: the checkpoint of step {step} could NOT be saved ({self.failed} failed "
                f"so far): {error} "
                f"{f'{there[-1].name} stays the newest one.' if there else 'There is none yet.'}"
            )


class _Writing:
    """This rank's file of one checkpoint on its way to the disk. `record`: its name, bytes and
    hash; None if it owns nothing."""

    def __init__(
        self,
        step: int,
        final: Path,
        manifest: dict[str, Any],
        lanes: dict[str, Any],
        file: Path | None,
        layout: Layout,
        starts: dict[str, int],
        in_background: bool,
    ):
        self.step, self.final = step, final
        self.manifest, self.lanes = manifest, lanes
        self.in_background = in_background
        self.record: Record | None = None
        self.error: BaseException | None = None
        self._file, self._layout, self._starts, self._written = file, layout, starts, 0
        self._thread: threading.Thread | None = None

    def start(self, values: Iterable[torch.Tensor], beat: Callable[[str], None]) -> None:
        if self.in_background:
            self._thread = threading.Thread(
                target=self._write,
                args=(self._counted(values, lambda where: None),),
                name="checkpoint",
                daemon=True,
            )
            self._thread.start()
        else:
            self._write(self._counted(values, beat))

    @property
    def finished(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait(self, beat: Callable[[str], None]) -> None:
        """For the thread; `beat` hears of every tensor that it has written meanwhile, and nothing
        of a disk that hangs."""
        written = -1
        while not self.finished:
            if self._written != written:
                written = self._written
                beat(f"saving step {self.step}")
            self._thread.join(1.0)

    def _write(self, values: Iterator[torch.Tensor]) -> None:
        try:
            if self._file is not None:
                digest = new_digest()
                write_tensors(
                    self._file, self._layout, values, {"starts": json.dumps(self._starts)}, digest
                )
                self.record = self._file.name, self._file.stat().st_size, digest.hexdigest()
        except BaseException as error:  # raised on all ranks when the save is settled
            self.error = error

    def _counted(
        self, values: Iterable[torch.Tensor], beat: Callable[[str], None]
    ) -> Iterator[torch.Tensor]:
        for value in values:
            beat(f"saving step {self.step}")
            yield value
            self._written += 1


def _write_manifest(
    partial: Path, common: dict[str, Any], parts: list[tuple[Record | None, dict[str, Any]]]
) -> None:
    """The manifest of a checkpoint, from what all ranks have in common and the part of each."""
    lanes, files = {}, {}
    for record, lanes_of_rank in parts:
        lanes.update(lanes_of_rank)
        if record is not None:
            name, size, digest = record
            files[name] = {"bytes": size, "hash": digest}
    manifest = {**common, "lanes": lanes, "files": files}
    manifest["hash"] = digest_of_manifest(manifest)
    text = json.dumps(manifest, indent=1) + "\n"
    replace_text(partial / MANIFEST, text, synced=True)


def _rename_over(partial: Path, final: Path) -> None:
    """Killed at any moment, one of the two is complete: `partial` too, by its manifest."""
    leaving = final.with_name(f".{final.name}.old")
    if final.exists():
        final.rename(leaving)
    partial.rename(final)
    shutil.rmtree(leaving, ignore_errors=True)
