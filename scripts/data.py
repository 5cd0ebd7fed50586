"""Looks into data: python scripts/data.py look PATH; python scripts/data.py convert PATH OUT"""

import sys

from uno_ds.commands.data import main

if __name__ == "__main__":
    sys.exit(main())
