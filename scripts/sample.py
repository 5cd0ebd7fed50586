"""Draws and edits images and describes them, with a trained model.

python scripts/sample.py generate|edit|caption --help
"""

import sys

from uno_ds.commands.sample import main

if __name__ == "__main__":
    sys.exit(main())
