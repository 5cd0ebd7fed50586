"""The whole suite within a time: `make bench` (any machine, 3 minutes), `make bench-gpu` (a CUDA machine, 9 minutes; QUICK=1: 3).

    python benchmarks/suite.py {cpu,gpu} [--quick] [--out FOLDER]

Each part is a command of its own with a time limit; it writes as it goes, so a part that is cut or fails loses nothing of the others.
"""

import sys
from pathlib import Path

# This folder itself stays off the path: transformers would take kernels.py for the library `kernels`.
sys.path[0] = str(Path(__file__).resolve().parent / "suite")

from suite_command import main  # noqa: E402  the path is set above

if __name__ == "__main__":
    sys.exit(main())
