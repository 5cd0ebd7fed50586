"""Inspects, imports, exports and verifies weights, and gathers checkpoints.

python scripts/weights.py inspect|export|merge|import|collect|verify --help
"""

import sys

from uno_ds.commands.weights import main

if __name__ == "__main__":
    sys.exit(main())
