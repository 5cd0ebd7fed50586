"""Rules of this code base: imports point down, files stay short, documents follow the code."""

import ast
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from uno_ds.recipe import load_recipe
from uno_ds.settings_page import with_settings_table

ROOT = Path(__file__).parent.parent
# Each floor may import those before it.
FLOORS = (
    "yaml_text",
    "settings",
    "files_on_disk",
    "json_text",
    "ranges",
    "kernels",
    "sequence",
    "data",
    "model",
    "generation",
    "objectives",
    "inspection",
    "evaluation",
    "cost",
    "training",
    "recipe_file",
    "objective_checks",
    "recipe_checks",
    "recipe",
    "settings_page",
    "run_sources",
    "run",
    "commands",
)


def imported_floors(path: Path) -> set[str]:
    """Floors that a file imports, also for types; only the type of the recipe, which holds the
    settings classes of all floors, may be imported from below."""
    tree = ast.parse(path.read_text())
    typing_only: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            typing_only.update(ast.walk(node))
    floors = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        if node in typing_only and modules == ["uno_ds.recipe.Recipe"]:
            continue
        names = [module.split(".")[1] for module in modules if module.startswith("uno_ds.")]
        floors |= {name for name in names if name != "__version__"}
    return floors


def test_imports_point_down():
    files = [
        (path, path.relative_to(ROOT / "uno_ds").parts[0].removesuffix(".py"))
        for path in (ROOT / "uno_ds").rglob("*.py")
    ]
    files += [(path, "kernels") for path in (ROOT / "kernels").rglob("*.py")]
    checked = 0
    for path, floor in files:
        if path.name == "__init__.py" and path.parent.name == "uno_ds":
            continue
        for other in imported_floors(path):
            assert FLOORS.index(other) <= FLOORS.index(floor), (
                f"{path.relative_to(ROOT)} is on floor {floor} and imports from {other} above it"
            )
            checked += 1
    assert checked > 50


MOST_LINES = 400
# Files that may be longer. Each says at its top why it is.
LONG_FILES = ("tests/distributed/ranks.py", "tests/helpers/dense.py")


def test_no_file_holds_two_subjects():
    folders = ("uno_ds", "kernels", "scripts", "benchmarks", "tests")
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in folders
        for path in ROOT.glob(f"{folder}/**/*.py")
    }
    assert {name.split("/")[0] for name in lines} == set(folders)
    long = {name for name, count in lines.items() if count > MOST_LINES}
    assert long <= set(LONG_FILES)
    for name in LONG_FILES:
        top = ast.get_docstring(ast.parse((ROOT / name).read_text()))
        assert top is not None and "longer than other files" in top


PACKAGES = ("uno_ds", "kernels", "benchmarks")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def hard_comprehensions(tree: ast.AST) -> Iterator[int]:
    """Lines of comprehensions with several loops, or inside a conditional expression or another
    comprehension's condition."""
    for node in ast.walk(tree):
        inside: list[ast.AST] = []
        if isinstance(node, ast.IfExp):
            inside = [node]
        elif isinstance(node, COMPREHENSIONS):
            if len(node.generators) > 1:
                yield node.lineno
            inside = list(chain.from_iterable(each.ifs for each in node.generators))
        for part in chain.from_iterable(map(ast.walk, inside)):
            if isinstance(part, COMPREHENSIONS):
                yield part.lineno


def test_a_comprehension_has_one_loop_and_is_in_no_conditional():
    examples = (
        "[b for a in x for b in a]",
        "[a for a in x if any(b for b in a)]",
        "1 if [a for a in x] else 2",
    )
    assert all(list(hard_comprehensions(ast.parse(example))) == [1] for example in examples)
    assert not list(hard_comprehensions(ast.parse("{a: [b for b in a] for a in x if a}")))
    folders = ("uno_ds", "kernels", "scripts", "benchmarks")
    found = []
    for path in chain.from_iterable(ROOT.glob(f"{folder}/**/*.py") for folder in folders):
        lines = hard_comprehensions(ast.parse(path.read_text()))
        found += [f"{path.relative_to(ROOT)}:{line}" for line in lines]
    assert not found


def test_no_file_has_a_legend_of_its_own_for_the_letters_of_shapes():
    legend = re.compile(r"docs/notation\.md[;,:]|\b(here|where) [A-Z] (is|are|counts?)\b")
    files = chain.from_iterable(ROOT.glob(f"{package}/**/*.py") for package in PACKAGES)
    found = [path.relative_to(ROOT) for path in files if legend.search(path.read_text())]
    assert not found, "docs/notation.md has the letters of the whole project"


def test_the_table_of_recipe_keys_is_what_the_settings_classes_say():
    text = (ROOT / "docs/settings.md").read_text()
    assert with_settings_table(text) == text, "run `make docs`"
    assert "`objective.caption_weight`" in text and "`engine.packs_per_step`" in text


def test_every_setting_that_the_readme_tells_to_set_exists():
    words = (ROOT / "README.md").read_text().replace("'", " ").split()
    assignments = [
        after.strip("`,;.)")
        for before, after in zip(words, words[1:], strict=False)
        if before.strip("`") == "--set" and "=" in after
    ]
    assert len(assignments) >= 4
    for assignment in assignments:
        if not assignment.startswith(("data.sources", "logging.wandb")):
            load_recipe("tiny_base", [assignment])


def test_every_module_with_functions_has_a_test_file_of_its_name_or_a_line_in_the_documentation():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs/testing.md").read_text().splitlines()
        if line.startswith(tuple(f"| `{package}/" for package in PACKAGES))
    ]
    documented = {module.strip("`"): tests.replace("`", "").split(", ") for module, tests in rows}
    for module, tests in documented.items():
        for path in (module, *tests):
            assert (ROOT / path).is_file(), f"docs/testing.md, {module}: {path} does not exist"
    missing = []
    for path in chain.from_iterable(ROOT.glob(f"{package}/**/*.py") for package in PACKAGES):
        module = path.relative_to(ROOT)
        nodes = ast.walk(ast.parse(path.read_text()))
        has_functions = any(isinstance(node, ast.FunctionDef) for node in nodes)
        if has_functions and str(module) not in documented and not own_test(module).is_file():
            missing.append(str(module))
    assert not missing, "neither a test file of that name nor a line in docs/testing.md"


def own_test(module: Path) -> Path:
    """uno_ds/data/text.py -> tests/data/test_text.py; kernels/cross_entropy/api.py ->
    tests/kernels/test_cross_entropy.py; benchmarks/commands/reading.py ->
    tests/benchmarks/test_reading.py."""
    package, *inner = module.parts
    if package == "kernels":
        folder, name = "kernels", inner[0].removesuffix(".py")
    elif package == "benchmarks":
        folder, name = "benchmarks", module.stem
    else:
        folder, name = "/".join(inner[:-1]), module.stem
    return ROOT / "tests" / folder / f"test_{name}.py"
