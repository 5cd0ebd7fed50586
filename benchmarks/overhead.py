"""What UNO costs over plain flow matching, measured.

    python benchmarks/overhead.py --recipe tiny [--rounds 12] [--json FILE]
    deepspeed --num_gpus 2 benchmarks/overhead.py --recipe tiny --stages step
    python benchmarks/overhead.py --recipe bagel_7b_uno --random-weights --stages graph --scenarios A,D,F

The modes flow, flow+caption, flow+regression and uno, and in the stage `graph` naive flow and naive uno too, run on the same
samples, one step after the other in turn. Stages: `step` is DeepSpeed's whole optimizer step, `graph` forward and backward
without it. Packs come from the recipe's data, or with --scenarios are drawn. The file is rewritten after every round.
"""

import sys
from pathlib import Path

# The checkout takes the place of this folder on the path: `import kernels` in transformers would
# otherwise find kernels.py beside this file.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.commands.overhead import main  # noqa: E402  the path is set above

if __name__ == "__main__":
    sys.exit(main())
