"""scripts/train.py with a pause: in the forward pass of optimizer step STEP rank RANK makes a file
FOLDER/paused and waits for FOLDER/go.

paused_train.py [--local_rank N] FOLDER RANK STEP [flags of train.py]
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests" / "distributed")]


def main() -> int:
    from faults import install
    from faults import main as train

    local_rank = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
    folder, rank, step, *flags = sys.argv[1 + len(local_rank) :]

    def pause() -> None:
        (Path(folder) / "paused").touch()
        while not (Path(folder) / "go").exists():
            time.sleep(0.02)

    install("forward", int(rank), int(step), do=pause)
    sys.argv[1:] = [*local_rank, *flags]
    return train()


if __name__ == "__main__":
    sys.exit(main())
