"""Encodes a recipe's sources once, for training without their encoders.

python scripts/prepare_data.py --recipe tiny --out FOLDER
"""

import sys

from uno_ds.commands.prepare import main

if __name__ == "__main__":
    sys.exit(main())
