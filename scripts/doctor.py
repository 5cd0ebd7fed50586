"""Says what runs on this machine, and how fast: python scripts/doctor.py --recipe bagel_7b_uno"""

import sys

from uno_ds.commands.json_output import reserve_stdout

if __name__ == "__main__":
    reserve_stdout()
    from uno_ds.commands.doctor import main

    sys.exit(main())
