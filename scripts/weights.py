"""Inspects, imports, exports and verifies weights.

python scripts/weights.py inspect|export|import|verify --help
"""

import sys

from uno_ds.commands.weights import main

if __name__ == "__main__":
    sys.exit(main())
