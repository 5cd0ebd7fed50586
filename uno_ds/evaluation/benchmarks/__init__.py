"""The benchmarks by name."""

from uno_ds.evaluation.benchmark import Benchmark
from uno_ds.evaluation.benchmarks.captions import Coco, Parti
from uno_ds.evaluation.benchmarks.dpg import Dpg
from uno_ds.evaluation.benchmarks.gedit import GEdit
from uno_ds.evaluation.benchmarks.geneval import GenEval
from uno_ds.evaluation.benchmarks.geneval2 import GenEval2
from uno_ds.evaluation.benchmarks.imgedit import ImgEdit
from uno_ds.evaluation.benchmarks.kris import Kris
from uno_ds.evaluation.benchmarks.scenes import Scenes
from uno_ds.evaluation.benchmarks.unigenbench import UniGenBench
from uno_ds.settings import SettingsError, printable

_ALL: tuple[Benchmark, ...] = (
    Scenes(),
    GenEval(),
    GenEval2(),
    Dpg(),
    UniGenBench(),
    Parti(),
    Coco(),
    GEdit(),
    ImgEdit(),
    Kris(),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


def get_benchmark(name: str) -> Benchmark:
    """Raises SettingsError for an unknown name."""
    if name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        message = f"'{printable(name)}' is no benchmark; allowed are {known}."
        raise SettingsError("--benchmark", message)
    return BENCHMARKS[name]


def variant_of(benchmark: Benchmark, given: str | None) -> str:
    """The set of prompts that is meant: the first where none is given. Raises SettingsError."""
    if given is None:
        return benchmark.variants[0]
    if given in benchmark.variants and given:
        return given
    choices = ", ".join(benchmark.variants)
    allowed = f"allowed are {choices}" if benchmark.variants != ("",) else "it has one set only"
    message = f"'{printable(given)}' is no set of prompts of {benchmark.name}; {allowed}."
    raise SettingsError("--variant", message)
