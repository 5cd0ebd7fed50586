"""What ZeRO sends on 1, 2 and 4 ranks against the model, and the modelled step time on 8 to 1,024 GPUs.

    python benchmarks/scale.py [--recipe tiny] [--ranks 1,2,4] [--json FILE]
    python benchmarks/scale.py --ranks "" --model bagel_7b_uno --gpu H200-141GB --rate TFLOPS [--json FILE]

Ranks are processes on the CPU of this machine and share its cores: what they send is compared, not how long they take.
"""

import sys
from pathlib import Path

# This folder itself stays off the path: transformers would take kernels.py for the library `kernels`.
sys.path[0] = str(Path(__file__).resolve().parent / "suite")

from scale_command import main  # noqa: E402  the path is set above

if __name__ == "__main__":
    sys.exit(main())
