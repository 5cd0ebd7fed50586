"""What the tests of faults have seen, printed at the end of the suite: conftest.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Survived:
    """`steps_lost`: done before the fault and done again; `seconds`: from the new start, without
    imports, to the first new step."""

    fault: str
    survived: bool
    steps_lost: int | None = None
    seconds: float | None = None


# The rows of the test that runs.
TABLE: list[Survived] = []


def lines(rows: list[Survived]) -> list[str]:
    width = max(len(row.fault) for row in rows)
    shown = [f"{'fault':{width}}  survived  steps lost  seconds to resume"]
    for row in rows:
        lost = "-" if row.steps_lost is None else row.steps_lost
        seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
        shown.append(
            f"{row.fault:{width}}  {'yes' if row.survived else 'NO':8}  {lost:>10}  {seconds:>17}"
        )
    return [*shown, f"{len(rows)} faults injected, {sum(row.survived for row in rows)} survived"]
