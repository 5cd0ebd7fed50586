"""README and docs/ point to what exists: files, make targets, commands and their flags."""

import argparse
import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest

from benchmarks.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "benchmarks/README.md",
        ROOT / "tests/goldens/sampling/README.md",
    ]
)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
SCRIPTS = {
    "train": "train",
    "sample": "sample",
    "weights": "weights",
    "data": "data",
    "estimate": "estimate",
    "doctor": "doctor",
    "prepare_data": "prepare",
    "inspect_model": "inspect_model",
    "evaluate": "evaluate",
    "trace_summary": "trace_summary",
}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_of(page: Path) -> list[str]:
    """Lines of code blocks, continued lines joined, and the pieces of code in the text."""
    text = text_of(page).replace("\\\n", " ")
    blocks = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return blocks + re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_relative_link_leads_to_a_file(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.relative_to(ROOT)} links to {link}"
        assert not anchor or anchor in anchors_of(path), f"{page.name} links to {link}"


def anchors_of(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_path_of_the_repository_that_is_named_exists(page: Path):
    folders = "uno_ds|kernels|benchmarks|scripts|tests|docs|ds_configs"
    named = re.compile(rf"(?<![\w./-])(?:{folders})/[\w./]+\.(?:py|md|json|sh|yaml)\b")
    for name in set(named.findall(text_of(page))):
        is_example = "NAME" in name or name.startswith("benchmarks/results/")
        exists = is_example or (ROOT / name).exists()
        assert exists, f"{page.relative_to(ROOT)} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_make_target_and_variable_that_is_named_exists(page: Path):
    makefile = text_of(ROOT / "Makefile")
    rules = re.findall(r"^([\w-]+(?: [\w-]+)*):", makefile, flags=re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    variables = set(re.findall(r"\$\((?:if \$\()?(\w+)", makefile))
    for code in code_of(page):
        # What follows two blanks or a # describes the command.
        command = re.split(r"\s{2,}|#", code)[0].split()
        given = [word.split("=")[0] for word in command if "=" in word]
        if "make" in command and command[: command.index("make")] == [
            word for word in command[: command.index("make")] if "=" in word
        ]:
            named = {word for word in command if "=" not in word} - {"make"}
            assert named <= targets, f"{page.name}: {code}"
            unused = [
                name for name in given if name not in variables and not name.startswith("UNO_DS_")
            ]
            assert not unused, f"{page.name}: {code}: the Makefile reads no {unused}"


def test_every_command_in_the_pages_exists_with_its_flags():
    checked = 0
    for page in PAGES:
        for code in code_of(page):
            if not (call := command_in(code)):
                continue
            module, words = call
            allowed = flags_of(module)
            for word in words:
                flag = word.split("=")[0]
                if flag.startswith("--"):
                    assert flag in allowed, f"{page.relative_to(ROOT)}: {code}: no {flag}"
            checked += 1
    assert checked > 30


def command_in(code: str) -> tuple[str, list[str]] | None:
    """(module, arguments) of a line that calls a script or a benchmark, or None."""
    code = code.split(" # ")[0].split(", then ")[0]
    if found := re.search(r"python -m benchmarks ([a-z_]+)(.*)", code):
        name, rest = found.groups()
        assert name in COMMANDS, f"`{code}` calls a benchmark that does not exist"
        return f"benchmarks.commands.{name}", words_of(rest)
    if found := re.search(r"benchmarks/(overhead|kernels)\.py(.*)", code):
        return f"benchmarks.commands.{found[1]}", words_of(found[2])
    if found := re.search(r"(?:scripts/)?\b(\w+)\.py ((?:-|[a-z]).*)", code):
        name, rest = found.groups()
        if name in SCRIPTS:
            return f"uno_ds.commands.{SCRIPTS[name]}", words_of(rest)
        assert "scripts/" not in found[0], f"`{code}` calls a script that does not exist"
    return None


def words_of(rest: str) -> list[str]:
    # Brackets of optional parts are notation, except in values such as --set 'a=[{b: c}]'.
    bare = rest if "'" in rest else re.sub(r"[\[\]{}]", " ", rest)
    return shlex.split(bare.replace("...", ""), posix="'" in rest)


def flags_of(module: str) -> set[str]:
    """The flags of a command and of all its subcommands, as its parser has them."""
    parsers: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_, **__):
        parsers.append(parser)
        raise SystemExit(0)

    if module not in KNOWN_FLAGS:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(argparse.ArgumentParser, "parse_known_args", stop)
            with pytest.raises(SystemExit):
                importlib.import_module(module).main([])
        KNOWN_FLAGS[module] = _flags(parsers[0])
    return KNOWN_FLAGS[module]


KNOWN_FLAGS: dict[str, set[str]] = {}


def _flags(parser: argparse.ArgumentParser) -> set[str]:
    flags = set()
    for action in parser._actions:
        flags.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                flags |= _flags(subparser)
    return flags


def test_the_order_of_imports_in_the_pages_is_the_one_that_is_checked():
    page = text_of(ROOT / "docs/architecture.md")
    sentence = page.split("Imports point one way.", 1)[1].split("each may import", 1)[0]
    checked = runpy.run_path(str(ROOT / "tests/test_house.py"))["FLOORS"]
    assert tuple(re.findall(r"`(\w+)`", sentence)) == checked


def test_every_module_of_the_api_reference_and_every_page_of_the_site_exists():
    documented = 0
    for page in (ROOT / "docs/reference").glob("*.md"):
        for module in re.findall(r"^::: ([\w.]+)$", text_of(page), flags=re.MULTILINE):
            assert importlib.util.find_spec(module), f"{page.name} documents {module}"
            documented += 1
    assert documented > 15
    pages = re.findall(r": ([\w/]+\.md)$", text_of(ROOT / "mkdocs.yml"), flags=re.MULTILINE)
    assert len(pages) > 15
    for name in pages:
        assert (ROOT / "docs" / name).exists() or (ROOT / name).exists(), name
    listed = {ROOT / "docs" / name for name in pages}
    assert {page for page in (ROOT / "docs").rglob("*.md")} <= listed
