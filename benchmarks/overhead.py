"""Measures the cost of UNO over plain flow matching: the same as python -m benchmarks overhead.

python benchmarks/overhead.py --recipe tiny [--rounds 12] [--json FILE]
deepspeed --num_gpus 2 benchmarks/overhead.py --recipe tiny --stages step
"""

import sys
from pathlib import Path

# The checkout replaces this folder on the path: `import kernels` in transformers would otherwise
# find kernels.py beside this file.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.__main__ import main  # noqa: E402  the path is set above
from uno_ds.commands.runner import end_process  # noqa: E402

if __name__ == "__main__":
    end_process(main(["overhead", *sys.argv[1:]]))
