"""Draws, scores and compares the images of public benchmarks: python scripts/evaluate.py
generate|score|report --help"""

import sys

from uno_ds.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
