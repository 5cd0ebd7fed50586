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


def geneval(folder: Path) -> Path:
    """Every kind of prompt; counting excludes one more than is asked for, as the official rows."""
    cup, dog = {"class": "cup", "count": 1}, {"class": "dog", "count": 1}
    wanted: list[tuple[str, list[dict], str]] = [
        ("single_object", [cup], "a photo of a cup"),
        ("two_object", [cup, dog], "a photo of a cup and a dog"),
        ("counting", [cup | {"count": 2}], "a photo of two cups"),
        ("colors", [dog | {"color": "brown"}], "a photo of a brown dog"),
        (
            "position",
            [cup, dog | {"position": ["left of", 0]}],
            "a photo of a dog left of a cup",
        ),
        (
            "color_attr",
            [cup | {"color": "red"}, dog | {"color": "black"}],
            "a photo of a red cup and a black dog",
        ),
        ("counting", [dog | {"count": 4}], "a photo of four dogs"),
        ("position", [dog, cup | {"position": ["above", 0]}], "a photo of a cup above a dog"),
        ("colors", [cup | {"color": "white"}], "a photo of a white cup"),
        ("single_object", [dog], "a photo of a dog"),
    ]
    rows = []
    for tag, include, prompt in wanted:
        row: dict[str, Any] = {"tag": tag, "include": include, "prompt": prompt}
        if tag == "counting":
            row["exclude"] = [include[0] | {"count": include[0]["count"] + 1}]
        rows.append(row)
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def geneval2(folder: Path) -> Path:
    """Nine rows of two questions, and one of four about two kinds of things."""
    rows: list[dict[str, Any]] = [
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
    rows.append(
        {
            "prompt": "two green cups and a dog",
            "atom_count": 4,
            "vqa_list": [
                ["How many cups are there?", "two"],
                ["Are the cups green?", "Yes"],
                ["Are there any cups?", "Yes"],
                ["Are there any dogs?", "Yes"],
            ],
            "skills": ["count", "attribute", "object", "object"],
        }
    )
    path = folder / "geneval2_data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


DPG_HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language"
).split(",")


def dpg(folder: Path) -> Path:
    """Ten rows: three texts, of which the first has one more question, without a parent."""
    rows = []
    for number in range(3):
        text = f'A cup, "number {number}", on a table.'
        graph = [("0", "Is there a cup?"), ("1", "Is the cup red?"), ("1,2", "Is it full?")]
        graph += [("0", "Is there a table?")] if number == 0 else []
        for place, (parents, question) in enumerate(graph, start=1):
            broad, fine = ("entity", "whole") if parents == "0" else ("attribute", "color")
            tuples = f"{broad} - {fine} (cup)"
            rows.append([f"cup{number}", text, "", place, parents, broad, fine, tuples, question])
    return _csv(folder / "dpg_bench.csv", DPG_HEADER, rows)


POINTS = ("Style", "Attribute - Size", "Attribute - Colour")
POINTS_ZH = ("风格", "属性-大小", "属性-颜色")


def unigenbench(folder: Path) -> Path:
    """Both languages, with one to three test points a row; the Chinese files call them otherwise.
    Each script has a line in a function of its own that is no Python, as the published ones."""
    (folder / "data").mkdir(exist_ok=True)
    (folder / "eval").mkdir(exist_ok=True)
    english, chinese = [], []
    for number in range(10):
        count = 1 + number % 3
        prompt, points = f'cup {number} {{in braces}}, "said" so', list(POINTS[:count])
        points_of_row = {
            "Subjects": "Other Entity",
            "Testpoints": points,
            "Testpoint Description": [f"{point} of it" for point in points],
        }
        english.append([number, prompt, json.dumps(points_of_row)])
        points = list(POINTS_ZH[:count])
        points_of_row = {
            "主体": "其他实体",
            "考点": points,
            "考点对应描述": [f"它的{point}" for point in points],
        }
        text = json.dumps(points_of_row, ensure_ascii=False)
        chinese.append([number, f"第{number}只杯子，水墨画风格。", text])
    for language, rows in (("en", english), ("zh", chinese)):
        header = ["index", f"prompt_{language}", f"sub_dims_{language}"]
        _csv(folder / f"data/test_prompts_{language}.csv", header, rows)
    (folder / "eval/gemini_en_eval.py").write_text(UNIGEN_SCRIPT)
    chinese_script = UNIGEN_SCRIPT
    for ours, theirs in zip(POINTS, POINTS_ZH, strict=True):
        chinese_script = chinese_script.replace(f'"{ours}"', f'"{theirs}"')
    (folder / "eval/gemini_zh_eval.py").write_text(chinese_script, encoding="utf-8")
    return folder / "data/test_prompts_en.csv"


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

def main(key, url):
    client = Client(key=key
                    url=url)

raise SystemExit("this file is not to be run")
"""


def parti(folder: Path) -> Path:
    path = folder / "PartiPrompts.tsv"
    kinds = ["Animals", "Food"]
    lines = ["Prompt\tCategory\tChallenge\tNote"]
    lines += [f"a cat number {number}\t{kinds[number % 2]}\tBasic\t" for number in range(10)]
    path.write_text("\n".join(lines) + "\n")
    return path


def coco(folder: Path) -> Path:
    entries = [
        {"image_id": 10 - number // 2, "id": number, "caption": f"a dog {number}."}
        for number in range(10)
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
    rows = []
    for number in range(10):
        image = {"bytes": encoded(picture(seed=number)), "path": "a.jpg"}
        english = number < 6
        row = {
            "task_type": ("ps_human", "text_change")[number % 2],
            "key": f"key{number}",
            "instruction": f"make it {number}" if english else f"把它改成{number}",
            "instruction_language": "en" if english else "cn",
            "input_image": image,
            "input_image_raw": image,
            "Intersection_exist": number % 3 == 0,
        }
        rows.append(row)
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
    for number in range(10):
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
    rows: dict[str, dict[str, dict[str, Any]]] = {
        "color_change": {
            "1": {"ori_img": "1.jpg", "ins_en": "make it red", "explain_en": ""},
            "2": {"ori_img": "2.jpg", "gt_img": "", "ins_en": "make it blue", "explain_en": ""},
        },
        "biology": {"7": {"ori_img": "7.png", "ins_en": "let it bloom", "explain_en": "spring"}},
        "practical_knowledge": {
            "5": {"ori_img": "5.jpg", "ins_en": "let it boil", "explain_en": "heat"}
        },
        "rule-based_reasoning": {
            "6": {"ori_img": "6.jpg", "ins_en": "the next move", "explain_en": "chess"}
        },
        "multi-element_composition": {"2": {"ori_img": ["2-1.jpg", "2-2.jpg"], "ins_en": "join"}},
        "temporal_prediction": {
            "3": {"ori_img": ["3-1.jpg", "3-2.jpg", "3-4.jpg"], "ins_en": "the third frame"},
            "8": {"ori_img": ["8-2.jpg", "8-3.jpg", "8-4.jpg"], "ins_en": "the first frame"},
        },
        "viewpoint_change": {
            "4": {"ori_img": "4.jpg", "gt_img": "4_gt.jpg", "ins_en": "turn"},
            "9": {"ori_img": "9.jpg", "ins_en": "turn back"},
        },
    }
    for category, entries in rows.items():
        (data / category).mkdir(parents=True)
        (data / category / "annotation.json").write_text(json.dumps(entries))
        for entry in entries.values():
            names = [entry["ori_img"]] if isinstance(entry["ori_img"], str) else entry["ori_img"]
            for seed, name in enumerate(
                [*names, *([entry["gt_img"]] if entry.get("gt_img") else [])]
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
    if "Are the cups green" in text or "Are there any" in text:
        return {"Yes": -0.1, " yes": -3.0, "No": -4.0}
    if text.startswith("Is there a cup?"):
        return "Yes, there is."
    if text.startswith("Is the cup red?"):
        return "no"
    if text.startswith(("Is it full?", "Is there a table?")):
        return "Yes"
    if "<score>" in text:
        lines = [f"\n{point}: {point} of it" for point in POINTS]
        lines += [f"\n{point}: 它的{point}" for point in POINTS_ZH]
        count = sum(line in text for line in lines)
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
