"""scripts/train.py with pauses: in the forward pass of each of these optimizer steps rank RANK
makes FOLDER/paused_STEP and waits for FOLDER/go_STEP.

paused_train.py [--local_rank N] FOLDER RANK STEP[,STEP...] [flags of train.py]
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "distributed")]


def main() -> int:
    import faults

    local_rank = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
    folder, rank, steps, *flags = sys.argv[1 + len(local_rank) :]

    def pause(step: int) -> None:
        (Path(folder) / f"paused_{step}").touch()
        while not (Path(folder) / f"go_{step}").exists():
            time.sleep(0.02)

    def is_step(step: int) -> bool:
        return faults._step == step

    if os.environ["RANK"] == rank:
        faults.install()
        for step in map(int, steps.split(",")):
            faults.FAULTS["forward"](partial(is_step, step), do=partial(pause, step))
    sys.argv[1:] = [*local_rank, *flags]
    return faults.main()


if __name__ == "__main__":
    from uno_ds.commands.runner import end_process

    end_process(main())
