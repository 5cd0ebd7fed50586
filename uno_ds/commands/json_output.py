"""For commands whose --json prints one JSON object on standard output. Libraries print there too,
DeepSpeed while it is imported, so the stream is saved before anything else is imported."""

import json
import os
import sys
from typing import Any, TextIO

_saved_stdout: TextIO | None = None


def reserve_stdout() -> None:
    """If --json is on the command line, redirects everything that is printed to standard error,
    except `write_json`."""
    global _saved_stdout
    if "--json" in sys.argv[1:] and _saved_stdout is None:
        sys.stdout.flush()
        _saved_stdout = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)


def write_json(value: Any) -> None:
    """Prints one line of JSON to the original standard output."""
    print(json.dumps(value), file=_saved_stdout or sys.stdout, flush=True)
