"""Every command reports a user's mistake as one line with exit code 2, through the one decorator of
commands/runner.py, and a process of several ranks ends without tearing the interpreter down."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_runs import tree

from benchmarks.__main__ import COMMANDS
from benchmarks.__main__ import main as benchmarks
from uno_ds.commands import estimate, prepare, sample, train, weights
from uno_ds.commands.runner import one_line_errors
from uno_ds.settings import SettingsError

ROOT = Path(__file__).resolve().parents[2]


def error_of(capsys, main, arguments: list[str]) -> str:
    """The only line that a refused command writes to stderr."""
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize("command", [estimate, prepare, sample, train, weights])
def test_a_mistake_on_the_command_line_is_one_line(command, capsys):
    assert error_of(capsys, command.main, ["--nothing"]).startswith("command line: ")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_on_the_command_line_of_a_benchmark_is_one_line(name, capsys):
    assert error_of(capsys, benchmarks, [name, "--nothing"]).startswith("command line: ")


def test_a_benchmark_over_nothing_is_refused(capsys):
    error = error_of(capsys, benchmarks, ["preparation", "--packs", "0"])
    assert "must be at least 1, got 0" in error


def test_a_recipe_that_cannot_be_prepared_is_one_line_of_the_benchmark_too(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree(tmp_path, ["scenes/t2i"])))
    message = error_of(capsys, benchmarks, ["preparation", "--recipe", str(path), "--packs", "1"])
    assert message.startswith("model.base: is null, so the visual encoder has no weights")


def test_other_errors_than_a_users_mistake_are_not_hidden(capsys):
    @one_line_errors
    def main(error: Exception) -> int:
        raise error

    assert main(SettingsError("key", "sentence.")) == 2
    assert capsys.readouterr().err == "error: key: sentence.\n"
    with pytest.raises(KeyError):
        main(KeyError("key"))


# Prints a line if the interpreter is torn down, which clears the names of this module.
KEPT = """
import atexit, runpy, sys, threading, time

class Kept:
    def __del__(self):
        print("torn down", flush=True)

kept = Kept()
atexit.register(print, "exit handler")
print("not flushed")
"""


def ended(code: str) -> tuple[int, list[str]]:
    """Exit code and printed lines of a process that runs `code`."""
    process = subprocess.run(
        [sys.executable, "-c", KEPT + code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    return process.returncode, process.stdout.splitlines()


def test_a_process_ends_with_its_output_and_exit_handlers_but_no_tear_down():
    """A thread of gloo may ask for the interpreter at any time, and while it is torn down that
    aborts the process."""
    expected = ["not flushed", "exit handler"]
    assert ended("sys.exit(3)") == (3, [*expected, "torn down"])
    end = "from uno_ds.commands.runner import end_process; "
    assert ended(end + "end_process(3)") == (3, expected)
    assert ended(end + "sys.stdout.close(); end_process(3)") == (3, expected[:1])
    late = "threading.Thread(target=lambda: (time.sleep(0.5), print('thread'))).start(); "
    assert ended(end + late + "end_process(3)") == (3, ["not flushed", "thread", "exit handler"])


@pytest.mark.parametrize(
    "program",
    [
        "run_path('scripts/train.py', run_name='__main__')",
        "run_path('benchmarks/overhead.py', run_name='__main__')",
        "run_module('benchmarks', run_name='__main__', alter_sys=True)",
    ],
)
def test_programs_of_several_ranks_end_so(program):
    arguments = "sys.argv = ['program', '--nothing']; "
    code, lines = ended(arguments + f"runpy.{program}")
    assert code == 2 and lines[-1] == "exit handler"
