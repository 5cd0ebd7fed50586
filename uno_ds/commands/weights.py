"""The command line of weights: inspect folders, export and import models, gather checkpoints,
replay golden cases."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from uno_ds.commands.flags import Parser
from uno_ds.commands.runner import one_line_errors
from uno_ds.json_text import shown
from uno_ds.kernels.backends import backend_names
from uno_ds.kernels.selection import KernelSettings
from uno_ds.model.adapter_merging import merge_adapters, read_share
from uno_ds.model.base_folder import import_base
from uno_ds.model.inspection import inspect
from uno_ds.model.weights import EXTRA_FILE, WEIGHTS_FILE, weight_files
from uno_ds.objectives.golden import compare, load_case
from uno_ds.objectives.sampling_case import is_sampling_case
from uno_ds.objectives.sampling_replay import replay
from uno_ds.training.checkpoint_file import (
    CheckpointTensors,
    doubt_about,
    is_checkpoint,
    open_checkpoint,
)
from uno_ds.training.collect import collect
from uno_ds.training.export import architecture_of, export_adapter, export_checkpoint


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    command: Callable[[argparse.Namespace], int] = options.run
    return command(options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="weights.py",
        description="Inspects weights, converts them, and checks the model against the public "
        "BAGEL code.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspect_parser = commands.add_parser(
        "inspect",
        help="parameters by part, dtypes, missing and unexpected names; or step, ranks and size of "
        "a checkpoint; reads headers only",
    )
    inspect_parser.add_argument("path", type=Path, metavar="DIR_OR_FILE")
    inspect_parser.set_defaults(run=_inspect)
    export_parser = commands.add_parser(
        "export", help="write a checkpoint of a run as a BAGEL folder, in bf16"
    )
    export_parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="RUN/checkpoints/step_N, RUN/checkpoints/latest, or RUN (its newest)",
    )
    export_parser.add_argument(
        "--ema", action="store_true", help="the moving average in place of the trained weights"
    )
    export_parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="the base that it was trained on, if that was moved",
    )
    export_parser.add_argument(
        "--adapter",
        action="store_true",
        help="write the adapters of a run with model.train = lora as a folder that peft and "
        "serving engines read, in place of the whole model with the adapters merged in",
    )
    export_parser.add_argument(
        "--packed",
        action="store_true",
        help="with --adapter: as vLLM-Omni binds it, gate and up projections as one",
    )
    export_parser.set_defaults(run=_export)
    collect_parser = commands.add_parser(
        "collect",
        help="complete a checkpoint whose files several machines wrote to their own disks",
    )
    collect_parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="RUN/checkpoints/step_N on this machine, which gets the files that it lacks",
    )
    collect_parser.add_argument(
        "--from",
        dest="places",
        nargs="+",
        default=[],
        metavar="PLACE",
        help="where they are: HOST (the same folder there, by ssh without a password), HOST:DIR, "
        "or DIR (default: the machines that wrote them, by the manifest)",
    )
    collect_parser.set_defaults(run=_collect)
    merge_parser = commands.add_parser(
        "merge", help="write a base with adapters merged in as a BAGEL folder, in bf16"
    )
    merge_parser.add_argument("source", type=Path, metavar="BASE")
    merge_parser.add_argument(
        "--adapter",
        action="append",
        required=True,
        metavar="DIR[:SHARE]",
        help="an adapter folder and by how much it counts (default 1); may be repeated",
    )
    merge_parser.set_defaults(run=_merge)
    import_parser = commands.add_parser(
        "import", help="check a BAGEL folder of any format and write it as a base folder, in bf16"
    )
    import_parser.add_argument("source", type=Path, metavar="SOURCE")
    import_parser.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="import weights although some of them are NaN or infinite",
    )
    import_parser.set_defaults(run=_import)
    for writer in (export_parser, merge_parser, import_parser):
        writer.add_argument("out", type=Path, metavar="OUT", help="new or empty folder")
        writer.add_argument(
            "--shard-size",
            type=_gigabytes,
            default=math.inf,
            metavar="GB",
            help="split the weights into files of at most GB * 10^9 bytes, which the public BAGEL "
            "code does not read (default: one file)",
        )
    verify_parser = commands.add_parser(
        "verify",
        help="replay golden cases of training and recorded cases of sampling, and compare every "
        "quantity",
    )
    verify_parser.add_argument("cases", nargs="+", type=Path, metavar="CASE.json")
    verify_parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest relative error that passes (default 1e-4)",
    )
    verify_parser.add_argument(
        "--backend",
        default="sdpa",
        choices=backend_names("attention"),
        help="attention backend (default sdpa)",
    )
    verify_parser.set_defaults(run=_verify)
    options = parser.parse_args(arguments)
    if options.command == "export" and options.adapter and options.shard_size != math.inf:
        parser.error("--shard-size splits a whole model, and --adapter writes none")
    if options.command == "export" and options.packed and not options.adapter:
        parser.error("--packed goes with --adapter")
    if options.command == "verify" and not 0 <= options.tolerance < math.inf:
        parser.error(f"--tolerance must be at least 0 and finite, got {options.tolerance}")
    return options


def _inspect(options: argparse.Namespace) -> int:
    if is_checkpoint(options.path):
        return describe_checkpoint(options.path)
    return describe(options.path)


def _verify(options: argparse.Namespace) -> int:
    return verify(options.cases, options.tolerance, options.backend)


def _import(options: argparse.Namespace) -> int:
    shard_bytes = options.shard_size * 1e9
    warnings = import_base(options.source, options.out, shard_bytes, options.allow_nonfinite)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{options.out}: the model of {options.source}, checked, in bf16")
    _note_shards(options.out)
    return 0


def _merge(options: argparse.Namespace) -> int:
    adapters = [read_share(text) for text in options.adapter]
    merge_adapters(options.source, options.out, adapters, options.shard_size * 1e9)
    print(f"{options.out}: {options.source} with {', '.join(options.adapter)}, in bf16")
    _note_shards(options.out)
    return 0


def _collect(options: argparse.Namespace) -> int:
    folder, copied = collect(options.checkpoint, options.places, print)
    print(f"{folder}: complete, {copied} file(s) copied")
    return 0


def _export(options: argparse.Namespace) -> int:
    if options.adapter:
        return write_adapter_of(options)
    shard_bytes = options.shard_size * 1e9
    manifest = export_checkpoint(
        options.checkpoint, options.out, options.ema, options.base, shard_bytes
    )
    weights = "moving average" if options.ema else "weights"
    print(f"{options.out}: {weights} after step {manifest['step']}, in bf16")
    _note_shards(options.out)
    return 0


def _note_shards(folder: Path) -> None:
    files = weight_files(folder)
    if files != [WEIGHTS_FILE]:
        print(
            f"note: the weights are in {len(files)} files; the public BAGEL code opens "
            f"{WEIGHTS_FILE} by name and cannot read them: for it, leave out --shard-size"
        )


def write_adapter_of(options: argparse.Namespace) -> int:
    """Writes the adapters of a checkpoint and prints what else the run trained."""
    manifest = export_adapter(
        options.checkpoint, options.out, options.ema, options.base, options.packed
    )
    weights = "moving average" if options.ema else "weights"
    print(f"{options.out}: adapters, {weights} after step {manifest['step']}, in fp32")
    if any(name.startswith("model.") and ".lora_" not in name for name in manifest["shapes"]):
        print(
            f"note: the run trained the latent interface in full, which is in {EXTRA_FILE}: "
            "programs that read peft's format only do not read it; for them, export the whole "
            "model, or train with lora.also_train=[metaqueries]"
        )
    return 0


def describe(path: Path) -> int:
    """Prints the contents of a folder or file; 1 if they do not fit the folder's architecture."""
    found = inspect(path)
    print(
        f"{path}: {sum(found.parameters.values()):,} values in {sum(found.dtypes.values())} "
        f"tensors, {found.files} file(s), "
        + ", ".join(f"{count} x {dtype}" for dtype, count in sorted(found.dtypes.items()))
    )
    for part, count in sorted(found.parameters.items(), key=lambda item: -item[1]):
        print(f"  {count:>16,}  {part}")
    if found.missing is None:
        print(
            "no llm_config.json in its folder, so names and shapes are not compared with an "
            "architecture"
        )
        return 0
    problems = {
        "missing": found.missing,
        "unexpected": found.unexpected or [],
        "of another shape": found.reshaped or [],
        "not in floating point": found.quantised or [],
    }
    for title, names in problems.items():
        print(f"{title}: {len(names)}")
        for name in names:
            print(f"  {shown(name)}")
    return 1 if any(problems.values()) else 0


def describe_checkpoint(path: Path) -> int:
    """Prints step, ranks and sizes of a checkpoint, once its files are verified."""
    folder, manifest = open_checkpoint(path, str(path))
    tensors = CheckpointTensors(folder, manifest)
    tensors.verify_once()
    architecture_of(folder, manifest)
    size = sum(record["bytes"] for record in manifest["files"].values())
    average = "no moving average"
    if manifest["ema_updates"] is not None:
        average = f"moving average over {manifest['ema_updates']} updates"
    print(
        f"{folder}: checkpoint after step {manifest['step']}, written by {manifest['world_size']} "
        f"rank(s) under ZeRO stage {manifest['stage']}"
    )
    print(
        f"  {sum(map(math.prod, tensors.shapes.values())):>16,}  trained values in "
        f"{len(tensors.shapes)} tensors; AdamW has made "
        f"{manifest['optimizer_steps']} steps; {average}"
    )
    print(f"  {size:>16,}  bytes in {len(manifest['files'])} file(s), fp32")
    doubt = doubt_about(folder)
    if doubt is not None:
        print(f"its weights are in doubt: {doubt}")
    print(
        f"frozen weights: {len(manifest['frozen'])} tensors of {manifest['base']}"
        if manifest["base"]
        else "no base: every weight was drawn at random"
    )
    return 0


def _gigabytes(text: str) -> float:
    value = float(text)
    # A byte to 10^9 GB.
    if not 1e-9 <= value <= 1e9:
        raise ValueError
    return value


def verify(cases: Sequence[Path], tolerance: float, backend: str) -> int:
    """Prints a line per quantity; 1 if one is beyond the tolerance. The attention mask has to be
    equal."""
    failures = 0
    KernelSettings(attention=backend).resolved()
    for path in cases:
        print(f"{path} (attention: {backend})")
        comparisons = (
            replay(path, backend, tolerance)
            if is_sampling_case(path)
            else compare(load_case(path, backend))
        )
        for comparison in comparisons:
            allowed = 0 if comparison.quantity == "attention mask" else tolerance
            good = comparison.relative <= allowed
            if comparison.note:
                verdict = "note"
            elif good:
                verdict = "ok  "
            else:
                verdict = "FAIL"
                failures += 1
            note = f" ({comparison.note})" if comparison.note else ""
            print(
                f"  {verdict}  absolute {comparison.absolute:.2e}  "
                f"relative {comparison.relative:.2e}  {comparison.quantity}{note}"
            )
    if failures:
        print(f"{failures} quantities beyond the tolerance of {tolerance:g}")
        return 1
    print(f"all quantities within the tolerance of {tolerance:g}")
    return 0
