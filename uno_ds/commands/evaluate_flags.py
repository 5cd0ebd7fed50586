"""Flags of the evaluation command."""

import argparse
import re
from pathlib import Path

from uno_ds.commands.flags import Parser
from uno_ds.commands.sample_flags import model_flags
from uno_ds.evaluation.benchmarks import BENCHMARKS
from uno_ds.settings import SettingsError

MOST = 1_000_000
SHARD = re.compile(r"(\d{1,6})/(\d{1,6})")


def evaluate_parser() -> Parser:
    parser = Parser(
        prog="evaluate.py",
        # Or --local of a command would be taken for the beginning of --local_rank.
        allow_abbrev=False,
        description="Draws the images of a benchmark, scores them, and compares checkpoints.",
        epilog="Benchmarks: " + "; ".join(_described(name) for name in BENCHMARKS) + ".",
    )
    # The launcher of deepspeed puts it before everything else.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_generate(commands)
    _add_score(commands)
    _add_report(commands)
    return parser


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Refuses counts below 1 or beyond all reason. Raises SettingsError."""
    for name in names:
        given = getattr(options, name)
        if given is not None and not 1 <= given <= MOST:
            flag = f"--{name.replace('_', '-')}"
            raise SettingsError(flag, f"must be at least 1 and at most {MOST:,}, got {given}.")


def shard_of(text: str | None) -> tuple[int, int]:
    """(number from 0, shards) of --shard 1/4 to 4/4. Raises SettingsError."""
    if text is None:
        return 0, 1
    found = SHARD.fullmatch(text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise SettingsError("--shard", f"must be 1/N to N/N, as 2/4, got '{text}'.")
    return int(found[1]) - 1, int(found[2])


def add_judge_flags(parser: argparse._ActionsContainer) -> None:
    """Which vision-language model judges, and how it is asked."""
    parser.add_argument(
        "--judge", metavar="URL", help="endpoint up to its version, as http://localhost:8000/v1"
    )
    parser.add_argument("--judge-model", metavar="NAME", help="name of the judge at the endpoint")
    parser.add_argument(
        "--judge-options",
        metavar="JSON",
        help="more fields of every request, null removes one: '{\"temperature\": null}'",
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=16,
        metavar="N",
        help="questions that are asked at once (default 16)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="for one answer (default 120)",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=5,
        metavar="N",
        help="further attempts after a failed one (default 5)",
    )


def _described(name: str) -> str:
    variants = [variant for variant in BENCHMARKS[name].variants if variant]
    return f"{name} ({', '.join(variants)})" if variants else name


def _benchmark_flags() -> Parser:
    flags = Parser(add_help=False)
    flags.add_argument(
        "--benchmark", required=True, metavar="NAME", help=f"one of {', '.join(BENCHMARKS)}"
    )
    flags.add_argument(
        "--variant", metavar="SET", help="the set of prompts, where a benchmark has several"
    )
    flags.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="the benchmark's own prompt file or folder (scenes has none)",
    )
    return flags


def _add_generate(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser(
        "generate",
        parents=[_benchmark_flags(), model_flags()],
        help="draw the images of a benchmark",
        description="Draws the images of a benchmark into the folders and file names that its own "
        "scorer reads. Images that exist are kept, so that a call that was stopped continues. "
        "torchrun or deepspeed share the prompts over their ranks.",
    )
    generate.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the evaluation (default evaluations/CHECKPOINT/BENCHMARK)",
    )
    generate.add_argument(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help="a setting of the sampler in place of BAGEL's, e.g. samples.text_guidance=5, or "
        "samples.edit.image_guidance=1.5 for an editing benchmark; may be repeated",
    )
    generate.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    generate.add_argument(
        "--shard", metavar="I/N", help="only the I-th of N shares of the prompts (1/N to N/N)"
    )
    generate.add_argument(
        "--batch",
        type=int,
        default=4,
        metavar="N",
        help="images that are computed together (default 4)",
    )


def _add_score(commands: argparse._SubParsersAction) -> None:
    score = commands.add_parser(
        "score",
        parents=[_benchmark_flags()],
        help="score the images",
        description="Scores drawn images: scenes by program; geneval, parti and coco by models in "
        "local folders; the others by a vision-language model behind an OpenAI-compatible "
        "endpoint. Its key is read from UNO_DS_JUDGE_KEY or OPENAI_API_KEY.",
    )
    score.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the evaluation, or (with --data) of images named as the benchmark's "
        "own scorer reads them",
    )
    score.add_argument(
        "--allow-missing", action="store_true", help="score although images are missing"
    )
    add_judge_flags(score)
    score.add_argument(
        "--judge-prompts",
        type=Path,
        metavar="FILE",
        help="the benchmark's own file of judge prompts, where it is not beside the data",
    )
    score.add_argument(
        "--local",
        action="store_true",
        help="score with models in local folders; what geneval, parti and coco do anyway",
    )
    score.add_argument(
        "--clip", type=Path, metavar="DIR", help="folder of a CLIP model (transformers)"
    )
    score.add_argument(
        "--detector",
        type=Path,
        metavar="DIR",
        help="geneval: folder of a Mask2Former model (transformers)",
    )
    score.add_argument(
        "--references", type=Path, metavar="DIR", help="coco: folder of the real images, for FID"
    )
    score.add_argument(
        "--inception", type=Path, metavar="FILE", help="coco: weights of torch-fidelity's Inception"
    )
    score.add_argument(
        "--device", default="auto", help="of local models: auto, cpu, cuda, ... (default auto)"
    )


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser(
        "report",
        help="compare checkpoints",
        description="One table of all results in the folders: means with intervals, differences "
        "to the first folder, and published rows.",
    )
    report.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="folders of evaluations, or above them"
    )
    report.add_argument(
        "--out",
        type=Path,
        default=Path("evaluations/report"),
        metavar="DIR",
        help="folder of report.md, report.json and report.html (default evaluations/report)",
    )
