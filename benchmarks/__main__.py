"""python -m benchmarks COMMAND [arguments]: one name for every benchmark."""

import importlib
import sys

COMMANDS = {
    "suite": "all parts within a time, and a report of them (make bench, make bench-gpu)",
    "overhead": "UNO against plain flow matching on the same samples",
    "kernels": "time kernels, or report what they compile to",
    "sweep": "overhead over metaqueries, captions, image sizes, supervised share",
    "scale": "communication of several ranks, and modelled GPUs",
    "report": "one page from result files",
    "loading": "host memory of loading, saving and exporting a base",
    "checkpointing": "seconds and bytes of checkpoints",
    "preparation": "what preparing data saves",
    "launch_table": "choose launch parameters of the Triton kernels",
    "scenes": "how often a model draws what a prompt of the scenes asks for",
}


def main(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {command:{width}}  {text}" for command, text in COMMANDS.items()]
        print("usage: python -m benchmarks COMMAND [arguments]\n\n" + "\n".join(lines))
        return 0
    if name not in COMMANDS:
        print(
            f"error: '{name}' is no benchmark; allowed are {', '.join(COMMANDS)}.", file=sys.stderr
        )
        return 2
    return importlib.import_module(f"benchmarks.commands.{name}").main(arguments[1:]) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
