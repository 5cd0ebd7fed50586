"""What `make venv` installs is what was tested, on every machine."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
# TORCH of the Makefile chooses the first; its build the second, and its own requirements the third:
# torch 2.12 wants setuptools below 82, torch 2.13 from 77.
LEFT_TO_TORCH = {"torch", "triton", "setuptools"}


def locked() -> dict[str, str]:
    """{canonical name: version} of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins), "a line is no exact version"
    versions = {canonicalize_name(name): version for name, version in pins}
    assert len(versions) == len(pins), "a package stands twice"
    return versions


def required() -> list[Requirement]:
    """What setup.py asks for, the extra of the tests included."""
    with mock.patch.object(setuptools, "setup") as call:
        runpy.run_path(str(ROOT / "setup.py"))
    asked = call.call_args.kwargs
    return [
        Requirement(line) for line in [*asked["install_requires"], *asked["extras_require"]["test"]]
    ]


def without_make() -> dict[str, str]:
    """The environment without what a `make` hands on to what it starts, as to these tests."""
    handed_on = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "LATEST", "TORCH", "TRITON", "PYTHON")
    return {key: value for key, value in os.environ.items() if key not in handed_on}


def commands_of(*arguments: str, target: str = "venv", **variables: str) -> str:
    """What `make` would run for a fresh environment."""
    return subprocess.run(
        ["make", "--dry-run", "--always-make", target, *arguments],
        cwd=ROOT,
        env=without_make() | variables,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_every_requirement_is_locked_at_a_version_within_its_range():
    versions, asked = locked(), required()
    assert len(asked) > 15
    for requirement in asked:
        name = canonicalize_name(requirement.name)
        if name not in LEFT_TO_TORCH:
            assert requirement.specifier.contains(versions[name]), requirement
    assert not LEFT_TO_TORCH & set(versions), "TORCH could then not be chosen"


def test_locked_versions_are_of_any_machine():
    for name, version in locked().items():
        assert Version(version).local is None, f"{name} is a build for one kind of machine"
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"://|^-|@", text, re.MULTILINE), "a place instead of a version"


def test_the_makefile_installs_the_locked_versions_and_with_latest_what_the_index_has():
    plain, latest, other_torch = (
        commands_of(),
        commands_of("LATEST=1"),
        commands_of("TORCH=torch==2.11.0"),
    )
    for commands in (plain, other_torch):
        assert '--constraint constraints.txt "torch==2.1' in commands
    assert "constraints.txt" not in latest and "--upgrade" in latest and '"torch==2.13.0"' in latest
    # One does not take the other's environment for its own.
    assert "touch .venv/.installed\n" in plain and "touch .venv/.installed-latest\n" in latest
    for commands in (plain, latest, other_torch):
        assert "rm -f .venv/.installed*" in commands
        for requirement in required():
            if requirement.name == "torch":
                (chosen,) = set(re.findall(r'"torch==([^"]+)"', commands))
                assert requirement.specifier.contains(chosen)
            if requirement.name == "triton":
                (chosen,) = re.findall(r'"triton==([^";]+)', commands)
                assert requirement.specifier.contains(chosen)


def test_tests_with_another_torch_have_an_environment_of_their_own():
    other = commands_of("TORCH=torch==2.15.0", target="test")
    lines = [line for line in other.splitlines() if ".venv" in line]
    assert lines and all(
        ".venv-torch-2.15.0" in line and not re.search(r"\.venv[/ ]", line) for line in lines
    )
    assert 'pip install --disable-pip-version-check "torch==2.15.0"' in other
    assert "touch .venv-torch-2.15.0/.installed\n" in other
    # Neither the tests as they are, nor a TORCH that the shell has for all targets.
    for commands in (
        commands_of(target="test"),
        commands_of(target="test", TORCH="torch==2.11.0"),
        commands_of("TORCH=torch==2.11.0", target="demo"),
    ):
        assert ".venv/bin/" in commands and ".venv-torch" not in commands


@pytest.mark.parametrize("changed", ["constraints.txt", "setup.py"])
def test_an_environment_is_stale_once_what_it_was_installed_from_has_changed(
    tmp_path: Path, changed: str
):
    for name in ("Makefile", "constraints.txt", "setup.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
        os.utime(tmp_path / name, (1000, 1000))
    stamp = tmp_path / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    os.utime(stamp, (2000, 2000))

    def stale() -> bool:
        asked = subprocess.run(
            ["make", "--question", "venv"], cwd=tmp_path, env=without_make(), check=False
        )
        return asked.returncode == 1

    assert not stale()
    os.utime(tmp_path / changed, (3000, 3000))
    assert stale()


def test_continuous_integration_trains_again_with_the_other_answer_about_fp16():
    (line,) = [
        line for line in (ROOT / ".ci" / "run").read_text().splitlines() if "TURN_FP16=1" in line
    ]
    variable = line.partition("=1 ")[0]
    assert f'os.environ.get("{variable}") == "1"' in (ROOT / "tests" / "conftest.py").read_text()
    paths = [word for word in line.split() if word.startswith("tests/")]
    assert paths[0] == "tests/distributed" and all((ROOT / path).exists() for path in paths)
    assert not any(path.endswith(("test_precision.py", "test_parity.py")) for path in paths[1:])


def test_a_checkout_installs_without_a_network(tmp_path):
    """As on a GPU machine that reaches nothing: by the setuptools that is there, into an empty
    environment, in one command that docs/gpu.md names."""
    command = "python -m pip install --no-index --no-build-isolation --no-deps ."
    assert command in (ROOT / "docs/gpu.md").read_text()
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("uno_ds", "kernels", "ds_configs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, checkout / name)
    empty = tmp_path / "environment"
    unreachable = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    words = [sys.executable, *command.split()[1:], "--target", str(empty), "--quiet"]
    environment = os.environ | unreachable | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "import uno_ds, uno_ds.kernels.backends as b, uno_ds.kernels.launch as l, "
            "uno_ds.kernels.conditioning_attention as c, importlib.resources as r; "
            "print(uno_ds.__file__, b.__file__, sorted(l.table(c.__name__))); "
            "print(r.files('uno_ds').joinpath('recipes/tiny.yaml').is_file(), "
            "r.files('uno_ds.ds_configs').joinpath('zero3.json').is_file())",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(empty)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert str(empty) in found.stdout and "sm_90" in found.stdout and "True True" in found.stdout
    assert str(ROOT / "uno_ds") not in found.stdout
