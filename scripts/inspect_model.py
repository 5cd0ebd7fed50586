"""Looks inside models: python scripts/inspect_model.py --checkpoint runs/tiny --help"""

import sys

from uno_ds.commands.inspect_model import main

if __name__ == "__main__":
    sys.exit(main())
