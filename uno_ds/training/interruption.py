"""Graceful interruption of a run: after a signal from the scheduler, or when its time limit is
reached."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Schedulers signal every process of a job, and launchers forward the signal: repetitions within
# this time count as one request.
SECONDS_OF_ONE_REQUEST = 2.0

SignalHandler = Callable[[int, FrameType | None], Any] | int | None


class Interruption:
    """`wanted`: this rank was asked to stop after the current step. The step's reduction of signals
    tells all ranks, so that all stop after the same step. A second SIGTERM ends the process at
    once, even while it waits in a collective.

    `max_hours`: time after which the run stops; None: never. To be entered in the main thread."""

    def __init__(self, max_hours: float | None = None):
        self.reason: str | None = None
        self._first_signal: float | None = None
        self._max_hours = max_hours
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._previous_handlers: dict[int, SignalHandler] = {}

    def __enter__(self) -> "Interruption":
        # Python's own handlers run between two instructions of the main thread, which may hang in a
        # collective. The interpreter also writes the signal's number into this socket at once,
        # which another thread reads.
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        for number in SIGNALS:
            self._previous_handlers[number] = signal.signal(number, lambda *_: None)
        self._previous_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._sender.close()

    @property
    def wanted(self) -> bool:
        is_due = self._deadline is not None and time.monotonic() >= self._deadline
        if is_due and self.reason is None:
            self.reason = f"--max-hours {self._max_hours:g}"
        return self.reason is not None

    def _listen(self) -> None:
        with self._receiver:
            while numbers := self._receiver.recv(64):
                for number in numbers:
                    if number in SIGNALS:
                        self._receive(number)

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
            self.reason = self.reason or signal.Signals(number).name
        elif number == signal.SIGTERM and now - self._first_signal > SECONDS_OF_ONE_REQUEST:
            os._exit(128 + number)
