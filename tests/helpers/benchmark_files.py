"""Made-up prompt files in the formats of the public benchmarks, in our own words, and judge prompts
for them."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from small_runs import encoded, picture

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def geneval(folder: Path) -> Path:
    rows = [
        {
            "tag": TAGS[number % 6],
            "include": [{"class": "cup", "count": 1 + number % 3}],
            "prompt": f"a photo of {number} cups",
        }
        for number in range(7)
    ]
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def geneval2(folder: Path) -> Path:
    rows = [
        {
            "prompt": f"{word} green cups under lamp {number}",
            "atom_count": 3,
            "vqa_list": [
                [f"How many cups are on picture {number}?", word],
                ["Are the cups green?", "Yes"],
            ],
            "skills": ["count", "attribute"],
        }
        for number, word in enumerate(["two", "three", "four"] * 3)
    ]
    path = folder / "geneval2_data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


DPG_HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language"
).split(",")


def dpg(folder: Path) -> Path:
    rows = []
    for number in range(3):
        text = f'A cup, "number {number}", on a table.'
        graph = [("0", "Is there a cup?"), ("1", "Is the cup red?"), ("1,2", "Is it full?")]
        for place, (parents, question) in enumerate(graph, start=1):
            broad = "entity" if place == 1 else "attribute"
            rows.append(
                [f"cup{number}", text, "", place, parents, broad, broad, f"{broad} (cup)", question]
            )
    return _csv(folder / "dpg_bench.csv", DPG_HEADER, rows)


POINTS = ("Style", "Attribute - Size", "Attribute - Colour")


def unigenbench(folder: Path) -> Path:
    rows = []
    for number in range(4):
        points = list(POINTS[: 1 + number % 3])
        points_of_row = {
            "Testpoints": points,
            "Testpoint Description": [f"{point} of it" for point in points],
        }
        rows.append([number, f"cup {number} {{in braces}}", json.dumps(points_of_row)])
    (folder / "data").mkdir(exist_ok=True)
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval/gemini_en_eval.py").write_text(UNIGEN_SCRIPT)
    header = ["index", "prompt_en", "sub_dims_en"]
    return _csv(folder / "data/test_prompts_en.csv", header, rows)


UNIGEN_SCRIPT = """
import nothing_that_exists
def ask(args):
    explanation_dict = {"Style": "how it looks",
                        "Attribute - Size": "how large", "Attribute - Colour": "hue"}
    explanation = "Points: <"
    test_explanation = "Here: <"
    while True:
        system = f'''Judge <<{prompt}>> by {testpoint}. {explanation} {test_explanation}
        Write <score>[]</score> with {{braces}}.'''
raise SystemExit("this file is not to be run")
"""


def parti(folder: Path) -> Path:
    path = folder / "PartiPrompts.tsv"
    kinds = ["Animals", "Food"]
    lines = ["Prompt\tCategory\tChallenge\tNote"]
    lines += [f"a cat number {number}\t{kinds[number % 2]}\tBasic\t" for number in range(6)]
    path.write_text("\n".join(lines) + "\n")
    return path


def coco(folder: Path) -> Path:
    entries = [
        {"image_id": 10 - number // 2, "id": number, "caption": f"a dog {number}."}
        for number in range(8)
    ]
    path = folder / "captions_val2014.json"
    path.write_text(json.dumps({"annotations": entries}))
    return path


VIE = '''
_context_no_delimit = """You judge. Answer { "score": [] }"""
_prompts_0shot_two_image_edit_rule = "Two pictures."
_prompts_0shot_tie_rule_SC = "How well was this done: <instruction>"
_prompts_0shot_rule_PQ = "How good does it look?"
'''


def gedit(folder: Path) -> Path:
    rows = [
        {
            "task_type": ("ps_human", "text_change")[number % 2],
            "key": f"key{number}",
            "instruction": f"make it {number}",
            "instruction_language": "en" if number < 5 else "cn",
            "input_image_raw": {"bytes": encoded(picture(seed=number)), "path": "a.jpg"},
        }
        for number in range(8)
    ]
    data = folder / "gedit"
    data.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), data / "train-0.parquet", row_group_size=3)
    (data / "vie_prompts.py").write_text(VIE)
    return data


def imgedit(folder: Path) -> Path:
    kinds = ("add", "remove", "style")
    data = folder / "Basic"
    (data / "singleturn/a").mkdir(parents=True)
    rows = {}
    for number in range(5):
        name = f"a/{number}.jpg"
        (data / "singleturn" / name).write_bytes(encoded(picture(seed=number)))
        rows[str(100 + number)] = {
            "id": name,
            "prompt": f"edit {number}",
            "edit_type": kinds[number % 3],
        }
    (data / "basic_edit.json").write_text(json.dumps(rows))
    prompts = {kind: f"Rate this {kind} edit: <edit_prompt>" for kind in kinds}
    (data / "prompts.json").write_text(json.dumps(prompts))
    return data / "basic_edit.json"


KRIS_PROMPTS = """
prompt_consist = "Is the rest kept? {instruct} Answer {{'consistency_score': 1}}"
prompt_quality = "Does it look well?"
prompt_instruction_following = "Is it done? {instruct}"
prompt_view_instruction_following = "Is it done as in the truth? {instruct}"
prompt_dual_evaluation = "Is it done, and right? {instruct} since {explanation}"
prompt_consist_multi = "Are the references kept? {instruct}"
prompt_instruction_multi = "Are they joined? {instruct}"
prompt_consist_temporal = "Does frame {N} fit? {instruct}"
prompt_instruction_temporal = "Is frame {N} next? {instruct}"
"""


def kris(folder: Path) -> Path:
    data = folder / "KRIS_Bench"
    rows = {
        "color_change": {"1": {"ori_img": "1.jpg", "ins_en": "make it red", "explain_en": ""}},
        "biology": {"7": {"ori_img": "7.png", "ins_en": "let it bloom", "explain_en": "spring"}},
        "multi-element_composition": {"2": {"ori_img": ["2-1.jpg", "2-2.jpg"], "ins_en": "join"}},
        "temporal_prediction": {
            "3": {"ori_img": ["3-1.jpg", "3-2.jpg", "3-4.jpg"], "ins_en": "the third frame"}
        },
        "viewpoint_change": {"4": {"ori_img": "4.jpg", "gt_img": "4_gt.jpg", "ins_en": "turn"}},
    }
    for category, entries in rows.items():
        (data / category).mkdir(parents=True)
        (data / category / "annotation.json").write_text(json.dumps(entries))
        for entry in entries.values():
            names = [entry["ori_img"]] if isinstance(entry["ori_img"], str) else entry["ori_img"]
            for seed, name in enumerate(
                [*names, *([entry["gt_img"]] if "gt_img" in entry else [])]
            ):
                kind = "PNG" if name.endswith("png") else "JPEG"
                (data / category / name).write_bytes(encoded(picture(seed=seed), kind))
    (data / "prompts.py").write_text(KRIS_PROMPTS)
    return data


WRITERS: dict[str, Callable[[Path], Path]] = {
    "geneval": geneval,
    "geneval2": geneval2,
    "dpg": dpg,
    "unigenbench": unigenbench,
    "parti": parti,
    "coco": coco,
    "gedit": gedit,
    "imgedit": imgedit,
    "kris": kris,
}


def rule(text: str, images: list[bytes]) -> Any:
    """What the test server's judge answers to the questions of all benchmarks."""
    if "How many cups" in text:
        return {"two": -0.5, " 2": -3.0, "three": -2.0, "dog": -9.0}
    if "Are the cups green" in text:
        return {"Yes": -0.1, " yes": -3.0, "No": -4.0}
    if text.startswith("Is there a cup?"):
        return "Yes, there is."
    if text.startswith("Is the cup red?"):
        return "no"
    if text.startswith("Is it full?"):
        return "Yes"
    if "<score>" in text:
        count = sum(f"\n{point}: {point} of it" in text for point in POINTS)
        return f"<analysis>['a']</analysis>\n<score>{[1, 0, 1][:count]}</score>"
    if "How well was this done" in text:
        return 'Well. {"score": [9, 4], "reasoning": "kept"}'
    if "How good does it look" in text:
        return '```json\n{"score" : [8, 9], "reasoning": "sharp"}\n```'
    if "Rate this" in text:
        return "Brief reasoning: fine.\nPrompt Compliance: 5\nVisual Naturalness: 4\nDetail: 3"
    if "right?" in text:
        return '{"instruction_score": 3, "knowledge_score": 2, "why": "x"}'
    if "look well" in text:
        return '{"quality_score": 4}'
    if "kept?" in text or "fit?" in text:
        return "Consistency score: 5"
    if "done" in text or "joined" in text or "next?" in text:
        return '{"instruction_score": 1, "reasoning": "no"}'
    raise AssertionError(f"no rule for {text!r}")


def _csv(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path
