"""Ending a run early and in order: on a signal from the scheduler, or when its time is up."""

import os
import signal
import socket
import threading
import time
from types import TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Schedulers signal every process of a job, and launchers pass the signal on: copies within this
# time are one request.
SECONDS_OF_ONE_REQUEST = 2.0


class Interruption:
    """`wanted`: this rank was asked to stop after the step that runs. The ranks agree through the
    step's own reduction, so that all stop after the same step. A second SIGTERM ends the process at
    once, also while it waits in a collective.

    `max_hours`: the run asks itself to stop after that time; None: never. To be entered by the main
    thread."""

    def __init__(self, max_hours: float | None = None):
        self.reason: str | None = None
        self._first = 0.0
        self._max_hours = max_hours
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        # Python's own handlers run between two instructions of the main thread, which may be in a
        # collective for ever; the bytes that the interpreter writes into this socket are seen by a
        # thread at once.
        self._inbox, self._outbox = socket.socketpair()
        self._outbox.setblocking(False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._outbox.close()

    @property
    def wanted(self) -> bool:
        if (
            self.reason is None
            and self._deadline is not None
            and time.monotonic() >= self._deadline
        ):
            self.reason = f"--max-hours {self._max_hours:g}"
        return self.reason is not None

    def _listen(self) -> None:
        with self._inbox:
            while numbers := self._inbox.recv(64):
                for number in numbers:
                    if number in SIGNALS:
                        self._receive(number)

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if not self._first:
            self.reason, self._first = self.reason or signal.Signals(number).name, now
        elif number == signal.SIGTERM and now - self._first > SECONDS_OF_ONE_REQUEST:
            os._exit(128 + number)
