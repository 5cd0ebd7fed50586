"""Writes TensorBoard's event file in the calling thread: the package's own writer uses a thread
that ends with a traceback if the disk is full."""

import io
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from uno_ds.training.run_files import AppendFile


class Board:
    """purge_step: TensorBoard hides steps from it on that an earlier process wrote."""

    def __init__(self, folder: Path, purge_step: int, warn: Callable[[str], None]):
        folder.mkdir(parents=True, exist_ok=True)
        process = f"{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        name = f"events.out.tfevents.{int(time.time()):010}.{process}"
        self._file = AppendFile(folder / name, warn)
        now = time.time()
        version = Event(wall_time=now, file_version="brain.Event:2")
        start = SessionLog(status=SessionLog.START)
        self._write(version, Event(wall_time=now, step=purge_step, session_log=start))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        now = time.time()
        summaries = [scalar(name, value) for name, value in values.items()]
        self._write(*[Event(wall_time=now, step=step, summary=summary) for summary in summaries])

    def close(self) -> None:
        self._file.close()

    def _write(self, *events: Event) -> None:
        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            writer.write(event.SerializeToString())
        self._file.write(records.getvalue())
