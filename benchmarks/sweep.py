"""How UNO's overhead moves with metaqueries, caption length, image size, supervised share, noise window, and the task.

    python benchmarks/sweep.py [--recipe tiny] [--rounds 6] [--seconds 60] [--json FILE]

Measured: forward and backward of flow and uno on drawn packs of the recipe's model with random weights. Modelled: the ratio of
operations of the same, and of BAGEL-7B around scenario A.
"""

import sys
from pathlib import Path

# This folder itself stays off the path: transformers would take kernels.py for the library `kernels`.
sys.path[0] = str(Path(__file__).resolve().parent / "suite")

from sweep_command import main  # noqa: E402  the path is set above

if __name__ == "__main__":
    sys.exit(main())
