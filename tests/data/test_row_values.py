"""Values of rows in the forms of public data: images as text, contents of turns that are lists of
parts, arrays of JSON, and objects of captions with metadata in them."""

import base64
import json

import pytest
from public_rows import cause, lines, opened, read
from shaded_rows import picture, shade_of, shaded_turns

from uno_ds.data.captions import CaptionReader
from uno_ds.settings import SettingsError


def talk(*turns: tuple[str, object]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


QUESTION = [("human", [1, "What is it?"]), ("gpt", ["A cup."])]
URI = f"data:image/png;base64,{base64.b64encode(picture(1)).decode()}"
CONTENTS = {
    "a mark": "<image>What is it?",
    "text and image parts": [
        {"type": "image", "text": None},
        {"type": "text", "text": "What is it?"},
    ],
    "an index": [{"type": "image", "index": 0}, {"type": "text", "text": "What is it?"}],
    "no mark": "What is it?",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_messages_with_contents_of_several_kinds(tmp_path, name):
    messages = talk(("user", CONTENTS[name]), ("assistant", "A cup."))
    row = {"images": ["a.png"], "messages": messages}
    (tmp_path / "a.png").write_bytes(picture(1))
    source = opened(lines(tmp_path / "a.jsonl", row))
    assert source.layout == "vlm" and shaded_turns(read(source)) == QUESTION


def test_parts_may_hold_their_images_and_other_parts_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    text = {"type": "text", "text": "What is it?"}
    kinds = [
        {"type": "image_url", "image_url": {"url": URI}},
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "video", "video": "a.mp4"},
        {"type": "image", "index": 3},
        {"type": "image"},
    ]
    rows = [{"messages": talk(("user", [kind, text]), ("assistant", "A cup."))} for kind in kinds]
    rows.append({"messages": talk(("system", "Be brief."), ("user", [text]), ("Assistant", "A."))})
    source = opened(lines(tmp_path / "a.jsonl", *rows))
    assert [shaded_turns(read(source, row)) for row in range(3)] == [QUESTION] * 3
    causes = [cause(source, row) for row in range(3, 6)]
    assert causes == ["unsupported_part", "image_count", "image_count"]
    assert shaded_turns(read(source, 6))[0] == ("human", ["Be brief."])


def test_a_json_array_of_conversations(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(picture(1))
    turns = [
        {"from": "human", "value": '<image>\nWhat is {it}? "]"'},
        {"from": "gpt", "value": "A cup."},
    ]
    rows = [{"id": str(row), "image": "a.png", "conversations": turns} for row in range(3)]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(rows, indent=2))
    (tmp_path / "config.json").write_text("{}")
    for given in (path, tmp_path, tmp_path / "*.json"):
        if given.name != "*.json":
            source = opened(given)
            assert (len(source), source.layout) == (3, "vlm")
    assert shaded_turns(read(source, 2))[0] == ("human", [1, 'What is {it}? "]"'])
    path.write_text(json.dumps(rows)[:-20])
    with pytest.raises(SettingsError, match="its array breaks off at the end of the file"):
        opened(path)
    path.write_text('[{"a": 1}, 2]')
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    assert len(opened(tmp_path / "lines.json")) == 3
    path.write_text('["a", {"a": 1}]')
    with pytest.raises(SettingsError, match="none of its 1 files can be read"):
        opened(path)


IMAGES = {
    "base64": base64.b64encode(picture(4)).decode(),
    "base64 with line breaks": base64.encodebytes(picture(4)).decode(),
    "base64 of addresses": base64.urlsafe_b64encode(picture(4)).decode(),
    "data URI": f"data:image/png;base64,{base64.b64encode(picture(4)).decode()}",
    "beside the data file": "photos/a.png",
    "address of a file": "file://photos/a.png",
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_as_text(tmp_path, name):
    (tmp_path / "photos").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "photos/a.png").write_bytes(picture(4))
    source = opened(lines(tmp_path / "a.jsonl", {"image": IMAGES[name], "text": "a cup"}))
    assert shade_of(read(source).image) == 4


def test_absolute_and_prefixed_names_lose_the_same_beginning_in_all_rows(tmp_path):
    (tmp_path / "coco").mkdir()
    for number in range(2):
        (tmp_path / f"coco/{number}.png").write_bytes(picture(number))
    names = ["/mnt/them/coco/0.png", "/mnt/them/coco/1.png", "/home/others/coco/1.png"]
    rows = [{"image": name, "text": "a cup"} for name in names]
    source = opened(lines(tmp_path / "a.jsonl", *rows))
    assert [shade_of(read(source, row).image) for row in (0, 1)] == [0, 1]
    # Another beginning may be that of another image of the same name.
    assert cause(source, 2) == "missing_image"
    assert "names of images without '/mnt/them/'" in source.reading.line()
    absolute = str(tmp_path / "coco/1.png")
    source = opened(lines(tmp_path / "b.jsonl", {"image": absolute, "text": "a cup"}))
    assert shade_of(read(source).image) == 1 and not source.reading.image_prefix


def test_bad_base64_and_addresses_are_bad_rows(tmp_path):
    values = ["data:image/png,AAAA", "data:image/png;base64,A*", "https://a/b.png", "AAAA" * 2000]
    rows = [{"image": value, "text": "a cup"} for value in values]
    source = opened(lines(tmp_path / "a.jsonl", *rows))
    causes = [cause(source, row) for row in range(4)]
    assert causes == ["bad_base64", "bad_base64", "missing_image", "undecodable_image"]


METADATA = {
    "caption": "a cup on a table",
    "qwen": "a white cup on a brown table",
    "lang_code": "en",
    "language": "en-US",
    "generator": "GPT 4",
    "by": "Qwen2.5-VL-7B",
    "words": ["a", "cup"],
    "meta": {"annotator": "some body", "note": "was checked twice"},
    "filepath": "val 2014",
}


def test_metadata_in_an_object_of_captions_is_no_caption():
    reader = CaptionReader()
    assert reader.texts(METADATA) == ["a cup on a table", "a white cup on a brown table"]
    assert sorted(reader.left_out) == sorted(METADATA.keys() - {"caption", "qwen"})
    # One word is a caption under a name of captions, or where there is no sentence beside it.
    assert CaptionReader().texts({"short": "cup", "long": "a white cup"}) == ["cup", "a white cup"]
    assert CaptionReader().texts({"a": "cup", "b": "mug"}) == ["cup", "mug"]
    assert CaptionReader().texts({"a": "一只杯子", "b": "白色的杯子"}) == ["一只杯子", "白色的杯子"]
    assert CaptionReader(["by"]).texts(METADATA) == ["Qwen2.5-VL-7B"]
