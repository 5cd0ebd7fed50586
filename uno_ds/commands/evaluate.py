"""The command line of evaluation: images of a benchmark, their scores, and tables of them."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from uno_ds import __version__
from uno_ds.commands.evaluate_flags import check_counts, evaluate_parser, shard_of
from uno_ds.commands.runner import REFUSED, print_error
from uno_ds.commands.sample import open_from_flags
from uno_ds.commands.score import score
from uno_ds.evaluation.benchmark import BAGEL_SIDE, Benchmark
from uno_ds.evaluation.benchmarks import get_benchmark, variant_of
from uno_ds.evaluation.drawing import draw_requests
from uno_ds.evaluation.folder import (
    FORMAT,
    Request,
    data_record,
    fingerprint,
    remove_partial_files,
    requests_of,
    write_record,
)
from uno_ds.evaluation.report import write_report
from uno_ds.evaluation.results import file_name, find_results
from uno_ds.evaluation.scoring import items_of
from uno_ds.generation.inference import SampleSettings
from uno_ds.generation.inference_model import OpenModel
from uno_ds.model.adapter_merging import read_share
from uno_ds.model.architecture import packaged
from uno_ds.sequence.composition import Geometry
from uno_ds.settings import SettingsError, build, override, to_plain
from uno_ds.training.checkpoint_file import is_checkpoint, open_checkpoint
from uno_ds.training.launch_environment import Launch, read_launch

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = evaluate_parser().parse_args(arguments)
        {"generate": _generate, "score": score, "report": _report}[options.command](options)
    except SettingsError as error:
        key = "--checkpoint" if error.key.startswith(("model.base", "tokenizer")) else error.key
        print_error(SettingsError(key, error.message))
        return REFUSED
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", flush=True)
        return INTERRUPTED
    return 0


def _generate(options: argparse.Namespace) -> None:
    check_counts(options, "limit", "batch")
    benchmark = get_benchmark(options.benchmark)
    variant = variant_of(benchmark, options.variant)
    shard, shards = shard_of(options.shard)
    launch = read_launch()
    items = items_of(benchmark, options.data, variant, options.limit)
    tree = _sampler_tree(benchmark, options.set or [])
    # Refuses wrong values before the model is opened.
    build(SampleSettings, tree, "samples")
    if options.device == "auto" and torch.cuda.is_available():
        options.device = f"cuda:{launch.local_rank}"
    opened = open_from_flags(options)
    settings = sized(tree, opened.model.shape.geometry)
    label = _label(options)
    out = options.out or _default_folder(label, benchmark, variant)
    requests = requests_of(benchmark, items, out, variant)
    record = {
        "format": FORMAT,
        "benchmark": benchmark.name,
        "variant": variant,
        "data": data_record(options.data, items),
        "checkpoint": _checkpoint_record(options, label),
        "settings": _plain(benchmark, settings),
        "images_per_prompt": benchmark.images_per_prompt,
        "precision": str(opened.model.lm_head.weight.dtype).removeprefix("torch."),
        "device": opened.model.lm_head.weight.device.type,
        "version": __version__,
    }
    write_record(out, record, requests)
    # A share of the prompts is the same whatever number of ranks draws it.
    chosen = items[shard::shards][launch.rank :: launch.world_size]
    keys = {item.key for item in chosen}
    mine = [request for request in requests if request.item.key in keys]
    remove_partial_files(mine)
    waiting = [request for request in mine if not request.path.exists()]
    _draw(opened, benchmark, waiting, settings, options.batch, launch)
    benchmark.finish(chosen, out, variant)
    benchmark.finish_all(items, out, variant)
    if launch.rank == 0:
        share = f"{len(mine)} of {len(requests)}" if len(mine) < len(requests) else len(mine)
        known = f"{len(waiting)} drawn, {len(mine) - len(waiting)} were there"
        print(f"{benchmark.name}: {share} images in {out}: {known}", flush=True)


def _draw(
    opened: OpenModel,
    benchmark: Benchmark,
    waiting: Sequence[Request],
    settings: SampleSettings,
    batch: int,
    launch: Launch,
) -> None:
    hidden = True if launch.rank else None
    with tqdm(total=len(waiting), desc=benchmark.name, unit="image", disable=hidden) as bar:
        try:
            for _ in draw_requests(opened, benchmark, waiting, settings, batch):
                bar.update()
        except OSError as error:
            reason = error.strerror or str(error)
            raise SettingsError("--out", f"an image cannot be written: {reason}.") from None


def _sampler_tree(benchmark: Benchmark, assignments: Sequence[str]) -> dict[str, Any]:
    """`samples` of a recipe: BAGEL's settings for the benchmark, then those of --set."""
    own = dict(benchmark.sampler)
    tree: dict[str, Any] = {"samples": {"edit": own} if benchmark.is_edit else own}
    for assignment in assignments:
        key = assignment.partition("=")[0].strip()
        if not key.startswith("samples.") or key.startswith("samples.prompts"):
            raise SettingsError("--set", f"'{key}' is no setting of the sampler (samples.*).")
        if key.startswith("samples.edit.") != benchmark.is_edit:
            right = "samples.edit.*" if benchmark.is_edit else "samples.*"
            message = f"'{key}' has no effect on {benchmark.name}; its settings are {right}."
            raise SettingsError("--set", message)
        override(tree, assignment)
    return tree["samples"]


def sized(tree: dict[str, Any], geometry: Geometry) -> SampleSettings:
    """The settings with BAGEL's size, or the model's square if that is smaller. An edit has the
    size of its source."""
    side = min(BAGEL_SIDE, geometry.latent_stride * geometry.latent_side)
    return build(SampleSettings, {"height": side, "width": side} | tree, "samples")


def _plain(benchmark: Benchmark, settings: SampleSettings) -> dict[str, Any]:
    """The settings that decide the images."""
    plain = to_plain(settings)
    chosen = plain["edit"] if benchmark.is_edit else plain
    return {key: value for key, value in chosen.items() if key not in ("edit", "prompts")}


def label_of(checkpoint: str) -> str:
    """A short name of a checkpoint: tiny of runs/tiny and runs/tiny/model, tiny_step_20 of a step,
    and else the name of the folder."""
    path = Path(os.path.abspath(packaged(checkpoint)))
    if path.name == "model" and (path.parent / "recipe.yaml").is_file():
        return path.parent.name
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}_{path.name}"
    return path.name


def _label(options: argparse.Namespace) -> str:
    """That of the checkpoint and its adapters, which are another model."""
    label = label_of(options.checkpoint)
    for text in options.adapter or ():
        folder, share = read_share(text)
        label += f"+{label_of(str(folder))}" + (f"x{share:g}" if share != 1 else "")
    return label


def _default_folder(label: str, benchmark: Benchmark, variant: str) -> Path:
    name = f"{benchmark.name}_{variant}" if variant else benchmark.name
    return Path("evaluations") / file_name(label) / name


def _checkpoint_record(options: argparse.Namespace, label: str) -> dict[str, Any]:
    path = packaged(options.checkpoint)
    trained = is_checkpoint(path)
    folder = open_checkpoint(path, "--checkpoint")[0] if trained else path
    try:
        weights = fingerprint(list(folder.glob("*.safetensors")))
    except OSError as error:
        raise SettingsError("--checkpoint", f"{folder}: {error.strerror}.") from None
    no_ema = options.no_ema if trained else None
    record = {"path": str(path), "label": label, "no_ema": no_ema, "weights": weights}
    if options.quantise is not None:
        record["quantise"] = options.quantise
    shares = [read_share(text) for text in options.adapter or ()]
    if shares:
        # Opened before, so that their files are there.
        record["adapters"] = [
            [share, fingerprint(list(folder.glob("*.safetensors")))] for folder, share in shares
        ]
    return record


def _report(options: argparse.Namespace) -> None:
    results = find_results(options.folders)
    paths = write_report(results, options.out)
    print(paths[0].read_text(encoding="utf-8"))
    print(f"Open {paths[-1]}; the table is in {paths[0]}", flush=True)
