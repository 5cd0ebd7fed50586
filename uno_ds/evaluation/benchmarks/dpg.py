"""DPG-Bench: a graph of questions about each picture, four pictures of a prompt in one grid."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from PIL import Image

from uno_ds.evaluation.benchmark import Picture
from uno_ds.evaluation.items import Item, check_keys, read_table, read_text, safe_name
from uno_ds.evaluation.judge import Question, Reply
from uno_ds.evaluation.judged import JudgedBenchmark, JudgeTexts, Values, yes_or_no
from uno_ds.evaluation.table import Row
from uno_ds.files_on_disk import replacing
from uno_ds.settings import SettingsError

# Our own wording: the official judge is a model that needs no request.
YES_OR_NO = "Answer yes or no."
COLUMNS = (
    "item_id",
    "text",
    "proposition_id",
    "dependency",
    "category_broad",
    "question_natural_language",
)
SIDE = 2


class Dpg(JudgedBenchmark):
    """Share of questions answered yes, where a question whose parent is not answered yes counts as
    no. The official script leaves out the first data row and takes categories from the last picture
    alone, before that rule; here all rows and pictures count, after it."""

    name: ClassVar[str] = "dpg"
    title: ClassVar[str] = "DPG-Bench"
    images_per_prompt: ClassVar[int] = 4
    fetch: ClassVar[str] = (
        "fetch dpg_bench/ (dpg_bench.csv and, for other texts than its own, prompts/) from "
        "github.com/TencentQQGYLab/ELLA (Apache-2.0)."
    )

    def items(self, data: Path, variant: str) -> list[Item]:
        table = data / "dpg_bench.csv" if data.is_dir() else data
        if not table.is_file():
            raise self.missing(table)
        questions: dict[str, dict[int, dict]] = {}
        texts: dict[str, str] = {}
        for number, row in enumerate(read_table(table, ",", COLUMNS), start=2):
            where = f"{table}, row {number}"
            key = safe_name(row["item_id"].strip(), where)
            texts.setdefault(key, row["text"])
            place, parents = _graph(row, where)
            questions.setdefault(key, {})[place] = {
                "question": row["question_natural_language"],
                "category": row["category_broad"].strip(),
                "parents": parents,
            }
        found = []
        for key, graph in questions.items():
            _check_graph(graph, f"{table}, {key}")
            file = table.parent / "prompts" / f"{key}.txt"
            prompt = read_text(file).strip() if file.is_file() else texts[key].strip()
            found.append(Item(key, prompt, "", {"graph": graph}))
        return check_keys(found, table)

    def scored_path(self, item: Item, number: int, variant: str) -> str:
        return f"{item.key}.png"

    def drawn_path(self, item: Item, number: int, variant: str) -> str:
        """Single pictures lie beside the folder that the official scorer reads."""
        return f"singles/{item.key}_{number}.png"

    def finish(self, items: Sequence[Item], folder: Path, variant: str) -> None:
        """The grid of every prompt whose pictures are there and newer than it."""
        for item in items:
            numbers = range(self.images_per_prompt)
            singles = [folder / self.drawn_path(item, number, variant) for number in numbers]
            grid = folder / "images" / self.scored_path(item, 0, variant)
            if all(path.is_file() for path in singles) and _is_older(grid, singles):
                _write_grid(singles, grid)

    def questions(
        self, item: Item, image: Path, texts: JudgeTexts | None, variant: str, number: int
    ) -> list[Question]:
        picture = Picture(image, quarter=number)
        found = []
        for place, node in item.facts["graph"].items():
            parts = (picture, f"{node['question']} {YES_OR_NO}")
            found.append(Question(str(place), parts, _is_yes, max_tokens=8))
        return found

    def row(self, item: Item, images: Sequence[Values]) -> Row:
        graph = item.facts["graph"]
        row = Row(item.key, prompt=item.prompt)
        for image in images:
            reached = after_dependencies(graph, {place: image[str(place)] for place in graph})
            row.add("overall", 100 * sum(reached.values()) / len(reached))
            for place, score in reached.items():
                row.add(graph[place]["category"], 100 * score)
        return row

    def headlines(self, rows: Sequence[Row]) -> dict[str, list[str]]:
        return {"overall": ["overall"]}


def after_dependencies(
    graph: Mapping[int, Mapping], answers: Mapping[int, bool]
) -> dict[int, float]:
    """Score of every question: 1 if it and, in the order of the graph, its parents hold, else 0.
    A parent that lost its point to its own parent takes its children's too, if it comes before
    them, as in the official script."""
    scores = {place: float(answers[place]) for place in graph}
    for place, node in graph.items():
        if any(scores[parent] == 0 for parent in node["parents"]):
            scores[place] = 0.0
    return scores


def _is_yes(reply: Reply) -> bool:
    return yes_or_no(reply.text)


def _graph(row: Mapping[str, str], where: str) -> tuple[int, list[int]]:
    """(number of the question, those of its parents)."""
    try:
        parents = [int(part) for part in row["dependency"].split(",")]
        return int(row["proposition_id"]), [parent for parent in parents if parent != 0]
    except ValueError:
        message = f"{where}: proposition_id and dependency must be whole numbers."
        raise SettingsError("--data", message) from None


def _check_graph(graph: Mapping[int, Mapping], where: str) -> None:
    for place, node in graph.items():
        unknown = [parent for parent in node["parents"] if parent not in graph]
        if unknown:
            message = f"{where}: question {place} depends on {unknown[0]}, which is not there."
            raise SettingsError("--data", message)


def _is_older(grid: Path, singles: Sequence[Path]) -> bool:
    if not grid.is_file():
        return True
    return grid.stat().st_mtime < max(path.stat().st_mtime for path in singles)


def _write_grid(singles: Sequence[Path], grid: Path) -> None:
    pictures = [Image.open(path).convert("RGB") for path in singles]
    width, height = pictures[0].size
    page = Image.new("RGB", (SIDE * width, SIDE * height))
    for number, picture in enumerate(pictures):
        page.paste(picture, (number % SIDE * width, number // SIDE * height))
    grid.parent.mkdir(parents=True, exist_ok=True)
    with replacing(grid) as partial:
        page.save(partial, format="PNG")
