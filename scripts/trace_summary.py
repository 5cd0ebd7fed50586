"""Says where the time of traced steps goes: python scripts/trace_summary.py RUN/traces/FILE"""

import sys

from uno_ds.commands.json_output import reserve_stdout

if __name__ == "__main__":
    reserve_stdout()
    from uno_ds.commands.trace_summary import main

    sys.exit(main())
