"""Looks into data: python scripts/data.py look PATH; python scripts/data.py convert PATH OUT"""

import sys

from uno_ds.commands.json_output import reserve_stdout

if __name__ == "__main__":
    reserve_stdout()
    from uno_ds.commands.data import main

    sys.exit(main())
