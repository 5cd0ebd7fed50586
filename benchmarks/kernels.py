"""Times the kernels: the same as python -m benchmarks kernels; see --help."""

import sys
from pathlib import Path

# The checkout replaces this folder on the path: `import kernels` in transformers would otherwise
# find this file.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.__main__ import main  # noqa: E402  the path is set above

if __name__ == "__main__":
    sys.exit(main(["kernels", *sys.argv[1:]]))
