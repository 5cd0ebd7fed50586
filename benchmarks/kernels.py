"""Times the kernels: python benchmarks/kernels.py --help, or python -m benchmarks kernels --help."""

import sys
from pathlib import Path

# The checkout takes the place of this folder on the path: `import kernels` in transformers would
# otherwise find this file.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.commands.kernels import main  # noqa: E402  the path is set above

if __name__ == "__main__":
    sys.exit(main())
