"""Looks into weights: python scripts/weights.py inspect DIR_OR_FILE; python scripts/weights.py verify CASE.json"""

import sys

from uno_ds.commands.weights import main

if __name__ == "__main__":
    sys.exit(main())
