"""How fast checkpoints are written and read beside plain writes and reads of as many bytes on the same disk, how long a save
holds training up, and how large a checkpoint is.

    python -m benchmarks checkpointing [--ranks 2] [--layers 1] [--repeats 3] [--folder DIR] [--json FILE]

Real ranks (gloo, CPU) under ZeRO-3 with fp32 masters, two moments and a moving average. Everything written is waited for
until it is on the disk, and what is read has been dropped from the system's cache before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.commands.loading import DTYPES, EMA, wide_recipe, wide_shape, write_base
from uno_ds.training.report import environment

CHUNK = 16 << 20


ROOT = Path(__file__).resolve().parents[2]


def plain_write(path: Path, size: int) -> None:
    content = memoryview(torch.randint(0, 255, (CHUNK,), dtype=torch.uint8).numpy())
    with path.open("wb", buffering=0) as stream:
        while size > 0:
            size -= stream.write(content[:size])
        os.fsync(stream.fileno())


def plain_read(path: Path) -> None:
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def drop_from_cache(path: Path) -> None:
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of(work: Callable[[], Any]) -> float:
    """Until all ranks are done."""
    torch.distributed.barrier()
    begun = time.perf_counter()
    work()
    torch.distributed.barrier()
    return time.perf_counter() - begun


def run_rank(folder: Path, ranks: int, repeats: int) -> None:
    """What one rank measures; DeepSpeed is imported in the ranks only."""
    from uno_ds.training import checkpoint
    from uno_ds.training.checkpoint import CheckpointSettings
    from uno_ds.training.checkpoint_file import open_checkpoint, rank_file
    from uno_ds.training.ema import Ema
    from uno_ds.training.engine import Engine
    from uno_ds.training.process_group import start_process_group
    from uno_ds.training.saving import Saver
    from uno_ds.training.shards import TrainedState

    engine = Engine(wide_recipe(folder, ranks, "fp32"), start_process_group(), read_answers=False)
    ema, state = Ema(engine, EMA), TrainedState(engine)
    # Moments exist after the first step only.
    state.begin_restore(1)
    state.end_restore()
    phases = (
        "plain_write",
        "save",
        "save_blocked",
        "background_blocked",
        "background_until_written",
        "plain_read",
        "load",
    )
    found: dict[str, Any] = {name: [] for name in phases}
    for number in range(repeats):
        saver = Saver(folder / "checkpoints", CheckpointSettings(keep_last=1), engine, ema)
        found["save"].append(
            seconds_of(lambda saver=saver, number=number: saver.save(2 * number, {}, {}))
        )
        background = Saver(
            folder / "checkpoints", CheckpointSettings(keep_last=1, asynchronous=True), engine, ema
        )
        # The first save allocates the buffer on the host.
        background.save(2 * number + 1, {}, {})
        background.settle()
        begun = time.perf_counter()
        background.save(2 * number + 1, {}, {})
        while not background.ready:
            time.sleep(0.01)
        found["background_until_written"].append(time.perf_counter() - begun)
        background.settle()
        found["save_blocked"] += saver.blocked_seconds
        found["background_blocked"].append(background.blocked_seconds[-1])
        latest, manifest = open_checkpoint(folder / "checkpoints" / "latest", "latest")
        own = latest / rank_file(engine.rank)
        size, plain = own.stat().st_size, folder / f"plain{engine.rank}"
        found["plain_write"].append(
            seconds_of(lambda plain=plain, size=size: plain_write(plain, size))
        )
        drop_from_cache(plain)
        drop_from_cache(own)
        found["plain_read"].append(seconds_of(lambda plain=plain: plain_read(plain)))
        found["load"].append(
            seconds_of(
                lambda latest=latest, manifest=manifest: checkpoint.load(
                    latest, manifest, engine, ema
                )
            )
        )
    found["bytes"] = sum(record["bytes"] for record in manifest["files"].values())
    found["trainable"] = sum(parameter.ds_numel for parameter in state.parameters.values())
    if engine.rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    write_base(folder / "base", wide_shape(options.layers), DTYPES["fp32"])
    arguments = [
        sys.executable,
        "-m",
        "benchmarks.commands.checkpointing",
        "--ranks",
        str(options.ranks),
        "--repeats",
        str(options.repeats),
        "--folder",
        str(folder),
        "--phase",
        "rank",
    ]
    shared = {
        **os.environ,
        "WORLD_SIZE": str(options.ranks),
        "LOCAL_WORLD_SIZE": str(options.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29733",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    processes = [
        subprocess.Popen(
            arguments, cwd=ROOT, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(options.ranks)
    ]
    codes = [process.wait() for process in processes]
    assert not any(codes), codes
    found = json.loads((folder / "found.json").read_text())
    size, state = found.pop("bytes"), 16 * found.pop("trainable")
    seconds = {name: round(statistics.median(values), 3) for name, values in found.items()}
    speed = {
        name: round(size / seconds[name] / 1e6)
        for name in ("plain_write", "save", "plain_read", "load")
    }
    return {
        "checkpoint_bytes": size,
        "state_bytes": state,
        "checkpoint_over_state": round(size / state, 4),
        "seconds": seconds,
        "all_seconds": {
            name: [round(value, 3) for value in values] for name, values in found.items()
        },
        "megabytes_per_second": speed,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--ranks", type=int, default=2, help="ranks on this machine (default 2)")
    parser.add_argument(
        "--layers",
        type=int,
        default=1,
        help="decoder layers with 54 million trained parameters each (default 1)",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="the median of so many is reported (default 3)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to write: the disk that is measured (default: a temporary folder)",
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--phase", choices=("rank",), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.phase:
        run_rank(options.folder, options.ranks, options.repeats)
        return 0
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = {"load_average_before": load, **measure(Path(folder), options)}
    seconds, speed = result["seconds"], result["megabytes_per_second"]
    print(
        f"checkpoint {result['checkpoint_bytes'] / 1e6:.0f} MB = {result['checkpoint_over_state']:.3f} x the trained state (16 bytes a parameter)"
    )
    print(
        f"plain write {speed['plain_write']} MB/s, save {speed['save']} MB/s; plain read {speed['plain_read']} MB/s, load {speed['load']} MB/s"
    )
    print(
        f"training waits {seconds['save_blocked']:.2f} s for a save, {seconds['background_blocked']:.2f} s for one in the background "
        f"(written after {seconds['background_until_written']:.2f} s)"
    )
    if options.json:
        settings = {"ranks": options.ranks, "layers": options.layers, "repeats": options.repeats}
        options.json.write_text(
            json.dumps({**environment(), "settings": settings, **result}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
