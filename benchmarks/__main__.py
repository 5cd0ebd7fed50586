"""python -m benchmarks COMMAND [arguments]: every benchmark by its name."""

import importlib
import sys

from uno_ds.commands.runner import end_process, one_line_errors
from uno_ds.settings import SettingsError

COMMANDS = {
    "suite": "run all benchmarks within a time limit and write a report (make bench, bench-gpu)",
    "overhead": "time UNO against plain flow matching on the same samples",
    "gain": "does supervision help: arms that train from one base, with intervals and a verdict",
    "smoke": "is every backend of every kernel right here, and how fast",
    "kernels": "time kernels, or report what they compile to",
    "sweep": "the overhead over metaqueries, captions, image sizes and supervised share",
    "scale": "communication of several ranks, and modelled time on many GPUs",
    "step_time": "the modelled time of a step against measured ones",
    "report": "one page from result files",
    "loading": "host memory of loading, saving and exporting a base",
    "reading": "images per second of several threads and processes",
    "adapters": "what adapters learn of the drop of the whole expert",
    "quantisation": "errors and cost of frozen weights in 8 and 4 bits",
    "checkpointing": "speed and size of checkpoints",
    "preparation": "cost and savings of preparing data",
    "launch_table": "choose launch parameters of the Triton attention",
}


@one_line_errors
def main(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        message = f"'{name}' is no benchmark; allowed are {', '.join(COMMANDS)}."
        raise SettingsError("command line", message)
    command = importlib.import_module(f"benchmarks.commands.{name}")
    return command.main(arguments[1:])


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: python -m benchmarks COMMAND [arguments]", "", *lines])


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
