"""From result files to one page: report.html, complete in itself, and report.md.

python benchmarks/report.py RESULT.json [...] --out FOLDER [--against OTHER.json ...] [--price 2.5 --electricity 0.2 --gpus 8 --gpu H200-141GB]
"""

import sys
from pathlib import Path

# This folder itself stays off the path: transformers would take kernels.py for the library `kernels`.
sys.path[0] = str(Path(__file__).resolve().parent / "suite")

from report_command import main  # noqa: E402  the path is set above

if __name__ == "__main__":
    sys.exit(main())
