"""Answers of a judge, kept as they come, so that no question is asked twice."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from uno_ds.evaluation.benchmark import Picture
from uno_ds.evaluation.items import digest_of
from uno_ds.evaluation.judge import Judge, Question, Reply, Unanswered
from uno_ds.evaluation.results import file_name
from uno_ds.settings import SettingsError, printable

# After so many questions in a row without an answer something is wrong with the endpoint.
FAILURES_IN_A_ROW = 24


class KeptAnswers:
    """answers/JUDGE.jsonl: a line for each answer, written when it comes, and for each question
    that got none that can be used, for a reader. A kill loses what was in flight; a line that it
    tore is passed over."""

    def __init__(self, folder: Path, judge: str):
        self.path = folder / "answers" / f"{file_name(judge)}.jsonl"
        self._lock = threading.Lock()
        self._replies: dict[tuple[str, str], Reply] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._read()
            self._stream = self.path.open("ab", buffering=0)
        except OSError as error:
            reason = error.strerror or str(error)
            raise SettingsError("--images", f"{self.path} cannot be written: {reason}.") from None

    def close(self) -> None:
        self._stream.close()

    def get(self, key: str, digest: str) -> Reply | None:
        """The kept answer to the same request, images included."""
        return self._replies.get((key, digest))

    def add(self, key: str, digest: str, reply: Reply) -> None:
        """Keeps an answer; any number of threads may call it. Raises OSError."""
        self._write({"key": key, "request": digest} | reply.plain())
        with self._lock:
            self._replies[key, digest] = reply

    def add_failure(self, key: str, digest: str, error: Unanswered) -> None:
        """Notes why a question has no answer. It is asked again by the next call. Raises
        OSError."""
        words = {"failed": error.cause, "message": str(error), "answer": error.answer}
        self._write({"key": key, "request": digest} | words)

    def _write(self, row: dict[str, Any]) -> None:
        line = json.dumps(row)
        with self._lock:
            self._stream.write(f"{line}\n".encode())

    def _read(self) -> None:
        if not self.path.exists():
            return
        torn = b""
        with self.path.open("rb") as stream:
            for line in stream:
                torn = b"" if line.endswith(b"\n") else line
                self._keep(line)
        if torn:
            with self.path.open("ab") as stream:
                stream.write(b"\n")

    def _keep(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            if "failed" in row:
                return
            tokens = {str(name): float(value) for name, value in row.get("tokens", {}).items()}
            reply = Reply(str(row["text"]), tokens)
            self._replies[str(row["key"]), str(row["request"])] = reply
        except (ValueError, KeyError, TypeError, AttributeError):
            return


class Digests:
    """Hashes of requests: of texts, images and what is asked for. Each image is read once."""

    def __init__(self, judge: Judge):
        self._judge = judge
        self._images: dict[Path, str] = {}

    def of(self, question: Question) -> str:
        fields = [self._judge.model, self._judge.fields, question.max_tokens, question.logprobs]
        parts = [self._part(part) for part in question.parts]
        text = json.dumps([*fields, parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _part(self, part: str | Picture) -> Any:
        if isinstance(part, str):
            return part
        if part.path not in self._images:
            self._images[part.path] = digest_of(part.path)
        return [self._images[part.path], part.quarter]


class Outcome:
    """Values by the key of the question, and the causes of those without. `asked`: questions that
    went to the endpoint; `kept`: those whose answer was there."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        self.asked = self.kept = 0
        self.last_message = ""

    @property
    def causes(self) -> dict[str, int]:
        return dict(Counter(self.failed.values()).most_common())


def ask_all(
    judge: Judge,
    questions: Iterable[Question],
    answers: KeptAnswers,
    parallel: int,
    done: Callable[[], object] = lambda: None,
) -> Outcome:
    """Asks what has no kept answer, `parallel` questions at once; holds no more than those in
    memory. `done` is called after each. Raises SettingsError if the endpoint answers nothing."""
    outcome, digests = Outcome(), Digests(judge)
    running: dict[Future[Any], str] = {}
    in_a_row = 0
    with ThreadPoolExecutor(parallel, thread_name_prefix="judge") as pool:
        try:
            for question in questions:
                digest = digests.of(question)
                if _is_kept(outcome, answers.get(question.key, digest), question):
                    done()
                    continue
                while len(running) >= parallel:
                    in_a_row = _collect(running, outcome, in_a_row, done)
                    _check_endpoint(judge, outcome, in_a_row)
                task = pool.submit(_ask, judge, question, digest, answers)
                running[task] = question.key
                outcome.asked += 1
            while running:
                in_a_row = _collect(running, outcome, in_a_row, done)
                _check_endpoint(judge, outcome, in_a_row)
        except BaseException:
            judge.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return outcome


def _ask(judge: Judge, question: Question, digest: str, answers: KeptAnswers) -> Any:
    try:
        reply, value = judge.ask(question)
    except Unanswered as error:
        answers.add_failure(question.key, digest, error)
        raise
    answers.add(question.key, digest, reply)
    return value


def _is_kept(outcome: Outcome, reply: Reply | None, question: Question) -> bool:
    if reply is None:
        return False
    try:
        outcome.values[question.key] = question.read(reply)
    except ValueError:
        # Read by an earlier version of the program, or edited: asked again.
        return False
    outcome.kept += 1
    return True


def _collect(
    running: dict[Future[Any], str], outcome: Outcome, in_a_row: int, done: Callable[[], object]
) -> int:
    """Waits for at least one answer; returns the number of failures in a row."""
    finished, _ = wait(running, return_when=FIRST_COMPLETED)
    for task in finished:
        key = running.pop(task)
        done()
        try:
            outcome.values[key] = task.result()
            in_a_row = 0
        except Unanswered as error:
            outcome.failed[key] = error.cause
            outcome.last_message = str(error)
            in_a_row += 1
        except OSError as error:
            reason = error.strerror or str(error)
            raise SettingsError("--images", f"answers cannot be kept: {reason}.") from None
    return in_a_row


def _check_endpoint(judge: Judge, outcome: Outcome, in_a_row: int) -> None:
    if in_a_row < FAILURES_IN_A_ROW:
        return
    raise SettingsError(
        "--judge",
        f"{judge.host} gave no usable answer to {in_a_row} questions in a row "
        f"({_listed(outcome.causes)}), at last: {printable(outcome.last_message, 300)}. "
        f"{len(outcome.values)} answers are kept; the same command continues.",
    )


def _listed(causes: Mapping[str, int]) -> str:
    return ", ".join(f"{cause} {count}" for cause, count in causes.items())
