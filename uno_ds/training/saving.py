"""Writes the checkpoints of a run, synchronously or in the background while training continues.

Every rank writes its own pieces into a partial folder; when every file is on the disk and visible
to another rank, the folder is renamed, then `latest` is updated. Where machines have the run's
folder on disks of their own, each gets the files of its ranks and the manifest. Frozen weights are
not written, only the hashes of the base's."""

import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

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
    point_latest_at,
    rank_file,
    rename_complete_partials,
)
from uno_ds.training.collectives import gather_objects, raise_on_all_ranks
from uno_ds.training.ema import Ema
from uno_ds.training.engine import Engine, StepResult
from uno_ds.training.folder_view import FolderView, view_folder
from uno_ds.training.manifest import FORMAT, Record, write_manifest
from uno_ds.training.retention import Retention, remove_checkpoint
from uno_ds.training.shards import TrainedState, shape_of

# Dtype and shape of each tensor of a rank's file, by KIND/NAME.
TensorSpecs = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Saver:
    """Writes checkpoints below `folder`. `save` and `settle` are collective.

    A save that fails on any rank, for example on a full disk, fails on all: its files are removed,
    earlier checkpoints are kept, `report` receives a line, and `failed` counts it. `heartbeat` is
    called after each part of the work."""

    def __init__(
        self,
        folder: Path,
        settings: CheckpointSettings,
        engine: Engine,
        ema: Ema | None,
        report: Callable[[str], None] = print,
        heartbeat: Callable[[str], None] = lambda phase: None,
    ):
        self.folder, self.settings = folder, settings
        self.engine, self.ema = engine, ema
        self._report, self._heartbeat = report, heartbeat
        self.saved = self.failed = 0
        self.blocked_seconds: list[float] = []
        self.retention = Retention(folder, settings, engine.recipe.health.spike_factor, report)
        self._pending: _PendingSave | None = None
        self._host_buffer: torch.Tensor | None = None
        self._view: FolderView | None = None

    def observe(self, step: int, result: StepResult) -> None:
        """Updates which checkpoints are proven or in doubt, after each step."""
        if self.engine.rank == 0:
            self.retention.observe(step, float(result.loss_on_host), result.skipped)

    def save(
        self, step: int, lanes: dict[str, Any], progress: dict[str, Any], *, wait: bool = False
    ) -> bool:
        """Saves checkpoint `step`; `lanes`: stream positions of this rank's lanes. False if it
        failed.

        In the background (`checkpoint.asynchronous`, without `wait`) it returns once the values are
        copied to host memory; all ranks have to call `settle` later, after the same step, which
        returns whether the save succeeded."""
        self.settle()
        started = time.perf_counter()
        self._heartbeat(f"saving step {step}")
        in_background = self.settings.asynchronous and not wait
        try:
            self._pending = self._begin(step, lanes, progress, in_background)
        except SettingsError as error:
            self._report_failure(step, error)
        is_saved = self._pending is not None
        if self._pending is not None and not self._pending.in_background:
            is_saved = self.settle()
        self.blocked_seconds.append(time.perf_counter() - started)
        return is_saved

    @property
    def ready(self) -> bool:
        """Whether this rank has written its part of a save in the background."""
        return self._pending is not None and self._pending.is_written

    def settle(self) -> bool:
        """Waits for the save in the background, if there is one, and completes it. False if it
        failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return True
        pending.wait(self._heartbeat)
        try:
            self._complete(pending)
        except SettingsError as error:
            self._report_failure(pending.step, error)
            return False
        self.saved += 1
        if self.engine.rank == 0:
            self.retention.saved(pending.final)
        if not self._seen().shared:
            self._remove_elsewhere()
        return True

    def _seen(self) -> FolderView:
        """Collective when it is called first."""
        if self._view is None:
            self._view = view_folder(self.folder)
            if not self._view.shared and self.engine.rank == 0:
                self._report(
                    f"note: the machines do not share {self.folder}: each keeps the files of its "
                    "own ranks, from which the same ranks on the same machines can resume; for any "
                    "other use, scripts/weights.py collect copies the others' files"
                )
        return self._view

    def _remove_elsewhere(self) -> None:
        """Removes on the other machines' disks what rank 0 has removed on its own. Collective."""
        removed: list[str] = gather_objects(self.retention.take_removed())[0]
        if not self._seen().leads or self.engine.rank == 0:
            return
        for name in removed:
            with suppress(OSError):
                remove_checkpoint(self.folder / name)

    def _begin(
        self, step: int, lanes: dict[str, Any], progress: dict[str, Any], in_background: bool
    ) -> "_PendingSave":
        final, engine = self.folder / f"step_{step}", self.engine
        view = self._seen()
        with raise_on_all_ranks():
            if view.leads:
                rename_complete_partials(self.folder)
                for left in leftovers(self.folder):
                    shutil.rmtree(left)
                part_of(final).mkdir(parents=True)
        state = TrainedState(engine)
        specs, values = self._pieces(state)
        self._check_space(specs)
        if in_background:
            values = self._copied_to_host(specs, values)
        pending = _PendingSave(
            step,
            final,
            self._manifest(step, state, progress),
            lanes,
            part_of(final) / rank_file(engine.rank) if specs else None,
            specs,
            {name: piece.start for name, piece in state.pieces.items()},
            in_background,
        )
        pending.start(values, self._heartbeat)
        return pending

    def _check_space(self, specs: TensorSpecs) -> None:
        """Collective; raises SettingsError on every rank if the disk is too small for all files."""
        own_bytes = sum(4 * math.prod(shape) for _, shape in specs.values())
        of_ranks = gather_objects(own_bytes)
        needed = sum(of_ranks[rank] for rank in self._seen().together())
        with raise_on_all_ranks():
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise SettingsError(
                    str(self.folder),
                    f"has {free:,} bytes left, and the checkpoint takes {needed:,}.",
                )

    def _manifest(self, step: int, state: TrainedState, progress: dict[str, Any]) -> dict[str, Any]:
        """The entries of the manifest that are the same on all ranks: without lanes and files."""
        engine = self.engine
        return {
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
            **({"regression": engine.regression} if engine.regression else {}),
            "tokenizer": str(engine.recipe.tokenizer_folder.resolve()),
            "architecture": to_plain(engine.recipe.architecture),
            "lora": to_plain(engine.recipe.lora) if engine.recipe.model.train == "lora" else None,
            **progress,
            "shapes": {
                name: list(shape_of(parameter)) for name, parameter in state.parameters.items()
            },
        }

    def _pieces(self, state: TrainedState) -> tuple[TensorSpecs, Iterable[torch.Tensor]]:
        """The pieces that this rank has to write, and their values one at a time."""
        if not state.pieces or self.engine.stage == 0 and self.engine.rank:
            return {}, ()
        kinds = [WEIGHT, *MOMENTS] if state.updates else [WEIGHT]
        if self.ema is not None:
            kinds.append(AVERAGE)
        specs: TensorSpecs = {}
        for kind in kinds:
            for name, piece in state.pieces.items():
                specs[f"{kind}/{name}"] = torch.float32, (piece.size,)
        return specs, self._values(state, kinds)

    def _values(self, state: TrainedState, kinds: list[str]) -> Iterator[torch.Tensor]:
        for kind in kinds:
            for name, piece in state.pieces.items():
                if kind == AVERAGE and self.ema is not None:
                    yield self.ema.shards[name][: piece.size]
                else:
                    yield state.read(kind, name)

    def _copied_to_host(
        self, specs: TensorSpecs, values: Iterable[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The values in one buffer of host memory, which is kept for the next save: allocating
        pinned memory is slow."""
        on_gpu = self.engine.device.type == "cuda"
        sizes = [math.prod(shape) for _, shape in specs.values()]
        if self._host_buffer is None or len(self._host_buffer) != sum(sizes):
            self._host_buffer = torch.empty(sum(sizes), pin_memory=on_gpu)
        copies = list(self._host_buffer.split(sizes))
        for copy, value in zip(copies, values, strict=True):
            copy.copy_(value, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _complete(self, pending: "_PendingSave") -> None:
        """Writes the manifest and renames the folder. Collective; raises SettingsError on every
        rank if one could not write its file."""
        with raise_on_all_ranks():
            if pending.error is not None:
                raise pending.error
        parts = gather_objects((pending.record, pending.lanes))
        partial, view = part_of(pending.final), self._seen()
        with raise_on_all_ranks():
            together = view.together()
            next_rank = together[(together.index(view.rank) + 1) % len(together)]
            record_of_next_rank, _ = parts[next_rank]
            if record_of_next_rank is not None:
                self._check_seen(partial, record_of_next_rank)
        common = pending.manifest
        if not view.shared:
            # The same on all disks, but only rank 0 knows the id of this start.
            common = gather_objects(common if view.rank == 0 else None)[0]
        hosts = None if view.shared else view.hosts
        with raise_on_all_ranks():
            if view.leads:
                write_manifest(partial, common, parts, hosts)
                self._mark_if_in_doubt(partial, pending.final)
                sync_folder(partial)
        # Every disk has its files and the manifest.
        with raise_on_all_ranks():
            if view.leads:
                _rename_over(partial, pending.final)
                sync_folder(self.folder)
                point_latest_at(pending.final)

    def _check_seen(self, partial: Path, record: Record) -> None:
        """Raises SettingsError if this rank does not see a file of another one that is written to
        the same folder."""
        name, size, _ = record
        path = partial / name
        if not path.is_file() or path.stat().st_size != size:
            raise SettingsError(
                str(path),
                f"was written by its rank but is not seen by rank {self.engine.rank}, although "
                "both see the same folder.",
            )

    def _mark_if_in_doubt(self, partial: Path, final: Path) -> None:
        doubt = self.retention.doubt
        if doubt is None:
            return
        mark_doubt(partial, doubt)
        self._report(
            f"warning: {final.name} is saved in doubt: {doubt}. --resume auto prefers an earlier "
            "one."
        )

    def _report_failure(self, step: int, error: SettingsError) -> None:
        self.failed += 1
        if self.engine.rank == 0 or self._view is not None and self._view.leads:
            shutil.rmtree(part_of(self.folder / f"step_{step}"), ignore_errors=True)
        if self.engine.rank != 0:
            return
        complete = complete_checkpoints(self.folder)
        newest = f"The newest one is {complete[-1].name}." if complete else "There is none yet."
        self._report(
            f"WARNING: the checkpoint of step {step} could NOT be saved ({self.failed} failed "
            f"so far): {error} {newest}"
        )


class _PendingSave:
    """This rank's part of a checkpoint that is not complete yet. `record`: name, bytes and hash of
    its file once it is written; None if it owns nothing."""

    def __init__(
        self,
        step: int,
        final: Path,
        manifest: dict[str, Any],
        lanes: dict[str, Any],
        file: Path | None,
        specs: TensorSpecs,
        starts: dict[str, int],
        in_background: bool,
    ):
        self.step, self.final = step, final
        self.manifest, self.lanes = manifest, lanes
        self.in_background = in_background
        self.record: Record | None = None
        self.error: BaseException | None = None
        self._file, self._specs, self._starts = file, specs, starts
        self._tensors_written = 0
        self._thread: threading.Thread | None = None

    def start(self, values: Iterable[torch.Tensor], heartbeat: Callable[[str], None]) -> None:
        if not self.in_background:
            self._write(self._counted(values, heartbeat))
            return
        self._thread = threading.Thread(
            target=self._write,
            args=(self._counted(values, lambda phase: None),),
            name="checkpoint",
            daemon=True,
        )
        self._thread.start()

    @property
    def is_written(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait(self, heartbeat: Callable[[str], None]) -> None:
        """Waits for the thread; calls `heartbeat` after each tensor that it has written, so not
        while a disk hangs."""
        last_seen = -1
        while self._thread is not None and self._thread.is_alive():
            if self._tensors_written != last_seen:
                last_seen = self._tensors_written
                heartbeat(f"saving step {self.step}")
            self._thread.join(1.0)

    def _write(self, values: Iterator[torch.Tensor]) -> None:
        if self._file is None:
            return
        metadata = {"starts": json.dumps(self._starts)}
        digest = new_digest()
        try:
            write_tensors(self._file, self._specs, values, metadata, digest)
            self.record = self._file.name, self._file.stat().st_size, digest.hexdigest()
        except BaseException as error:  # raised on all ranks when the save is settled
            self.error = error

    def _counted(
        self, values: Iterable[torch.Tensor], heartbeat: Callable[[str], None]
    ) -> Iterator[torch.Tensor]:
        for value in values:
            heartbeat(f"saving step {self.step}")
            yield value
            self._tensors_written += 1


def _rename_over(partial: Path, final: Path) -> None:
    """Replaces `final`. Killed at any moment, one complete checkpoint is left: `partial` counts, by
    its manifest."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)
