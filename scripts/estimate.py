"""Estimates operations, memory and traffic of a recipe.

python scripts/estimate.py --recipe bagel_7b_uno --world-size 8
"""

import sys

from uno_ds.commands.json_output import reserve_stdout

if __name__ == "__main__":
    reserve_stdout()
    from uno_ds.commands.estimate import main

    sys.exit(main())
