"""For commands whose --json promises one JSON object on standard output: libraries print there too,
DeepSpeed while it is imported, so the stream is set aside before anything else is."""

import json
import os
import sys
from typing import Any, TextIO

_aside: TextIO | None = None


def reserve_stdout() -> None:
    """If --json is on the command line, sends everything that is printed to standard error, but for
    `write_json`."""
    global _aside
    if "--json" in sys.argv[1:] and _aside is None:
        sys.stdout.flush()
        _aside = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)


def write_json(value: Any) -> None:
    print(json.dumps(value), file=_aside or sys.stdout, flush=True)
