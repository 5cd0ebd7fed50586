"""Sources: real layouts are read, and whatever is wrong with a row or a file costs that row or file
only."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from uno_ds.data.images import BadRow
from uno_ds.data.layouts.conversation import Conversation
from uno_ds.data.layouts.edit import Edit
from uno_ds.data.layouts.text_to_image import TextToImage
from uno_ds.data.scenes import ScenesSettings
from uno_ds.data.sources import Source, SourceSettings, check_usable
from uno_ds.settings import SettingsError, build

CAPTIONS = json.dumps(
    {"short": "a cup", "long": ["a white cup.", "a cup on a table."], "blank": "  "}
)


def picture(shade: int = 100, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (shade, 50, 50)).save(buffer, kind)
    return buffer.getvalue()


def shade_of(image: Image.Image) -> int:
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    return image.getpixel((3, 3))[0]


def write_t2i(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist(
            rows, schema=pa.schema([("image", pa.binary()), ("captions", pa.string())])
        ),
        path,
    )
    return path


def write_lines(
    folder: Path, lines: list[str | dict], images: dict[str, bytes] | None = None
) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, data in (images or {"a.png": picture()}).items():
        (folder / "images" / name).write_bytes(data)
    path = folder / "conversations.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return path


@pytest.fixture
def open_source(tmp_path):
    def opened(path, **values) -> Source:
        return Source(
            build(SourceSettings, {"path": str(path), **values}),
            root=tmp_path / "root",
            cache=tmp_path / "cache",
            embedded=ScenesSettings(rows=12),
        )

    return opened


def read(source: Source, index: int = 0, seed: int = 0):
    return source.read(index, np.random.default_rng(seed))


def cause(source: Source, index: int = 0) -> str:
    with pytest.raises(BadRow) as caught:
        read(source, index)
    return caught.value.cause


def talk(human: str = "<image>\nWhat is it?", gpt: str = "A cup.") -> list[dict]:
    return [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]


def test_text_to_image_rows_over_several_files_in_the_order_of_their_names(tmp_path, open_source):
    for number in (1, 0):
        write_t2i(
            tmp_path / f"photos/t2i/{number:05d}.parquet",
            [{"image": picture(10 * number + row), "captions": CAPTIONS} for row in range(3)],
        )
    source = open_source(tmp_path / "photos/t2i")
    assert (len(source), source.layout, source.name, source.unreadable_files) == (
        6,
        "t2i",
        "photos/t2i",
        {},
    )
    assert [shade_of(read(source, row).image) for row in range(6)] == [0, 1, 2, 10, 11, 12]
    example = read(source, 4)
    assert isinstance(example, TextToImage) and example.key == "photos/t2i:4"
    assert example.captions == ["a cup", "a white cup.", "a cup on a table."]
    assert (
        len(open_source(tmp_path / "photos/*/00001.parquet"))
        == len(open_source(tmp_path / "photos/t2i/00001.parquet"))
        == 3
    )


def test_bad_rows_of_a_parquet_file_have_their_causes_and_spare_the_others(tmp_path, open_source):
    rows = [
        (picture(), CAPTIONS),
        (picture()[:60], CAPTIONS),
        (b"", CAPTIONS),
        (None, CAPTIONS),
        (picture(), '{"a": '),
        (picture(), "no json"),
        (picture(), '{"a": " ", "b": []}'),
        (picture(), None),
        (picture(), "3"),
        (picture(7), CAPTIONS),
    ]
    path = write_t2i(
        tmp_path / "a.parquet", [{"image": image, "captions": captions} for image, captions in rows]
    )
    source = open_source(path)
    assert [cause(source, row) for row in range(1, 9)] == [
        "undecodable_image",
        "empty_image",
        "missing_image",
        "bad_json",
        "bad_json",
        "no_caption",
        "no_caption",
        "bad_json",
    ]
    assert shade_of(read(source, 9).image) == 7 and shade_of(read(source, 0).image) == 100


@pytest.mark.parametrize(
    "column, value, expected",
    [
        ("caption", " a cup ", ["a cup"]),
        ("text", "a cup", ["a cup"]),
        ("captions", ["a", "b", "a"], ["a", "b"]),
        ("caption", ["a", "", "b"], ["a", "b"]),
    ],
)
def test_plain_caption_columns_and_image_structs_are_accepted(
    tmp_path, open_source, column, value, expected
):
    rows = [{"image": {"bytes": picture(33), "path": None}, column: value}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    example = read(open_source(tmp_path / "a.parquet"))
    assert example.captions == expected and shade_of(example.image) == 33


def test_an_image_feature_of_datasets_is_not_decoded_by_it(tmp_path, open_source):
    """A truncated image must be a bad row of ours, in a parquet and in an arrow file written by
    `datasets` itself."""
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    table = datasets.Dataset.from_dict(
        {
            "image": [
                {"bytes": picture(44), "path": None},
                {"bytes": picture()[:50], "path": None},
            ],
            "caption": ["a", "b"],
        },
        features=features,
    )
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        source = open_source(path)
        assert shade_of(read(source, 0).image) == 44 and cause(source, 1) == "undecodable_image"


def test_arrow_files_in_the_file_format_are_read(tmp_path, open_source):
    table = pa.table({"image": pa.array([picture(55)], pa.binary()), "captions": [CAPTIONS]})
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    assert shade_of(read(open_source(tmp_path / "a.arrow")).image) == 55


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "inside"])
def test_an_unreadable_parquet_file_beside_a_good_one_is_skipped_and_named(
    tmp_path, open_source, damage
):
    good = write_t2i(tmp_path / "b.parquet", [{"image": picture(9), "captions": CAPTIONS}] * 3)
    data = good.read_bytes()
    bad = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "garbage": b"x" * 500,
        "inside": data[:20] + bytes(60) + data[80:],
    }
    (tmp_path / "a.parquet").write_bytes(bad[damage])
    source = open_source(tmp_path)
    ((name, reason),) = source.unreadable_files.items()
    assert name == str(tmp_path / "a.parquet") and reason and "\n" not in reason
    assert len(source) == 3 and shade_of(read(source, 0).image) == 9


def test_a_changed_file_is_not_read_from_an_old_copy(tmp_path, open_source):
    for shade in (1, 2):
        path = write_t2i(tmp_path / "a.parquet", [{"image": picture(shade), "captions": CAPTIONS}])
        os.utime(path, (shade * 1000, shade * 1000))
        assert shade_of(read(open_source(path)).image) == shade


def test_edit_rows_give_neighbouring_images_with_the_instruction_between_them(
    tmp_path, open_source
):
    rows = [
        {
            "image_list": [picture(shade) for shade in (10, 20, 30)],
            "instruction_list": [["ten to twenty", " "], ["twenty to thirty"]],
            "caption_list": [["ten"], ["twenty"], ["thirty"]],
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = open_source(tmp_path)
    seen = set()
    for seed in range(20):
        example = read(source, 0, seed)
        assert isinstance(example, Edit)
        seen.add(
            (
                shade_of(example.source),
                shade_of(example.target),
                *example.instructions,
                *example.captions,
            )
        )
        assert read(source, 0, seed).instructions == example.instructions
    assert seen == {(10, 20, "ten to twenty", "twenty"), (20, 30, "twenty to thirty", "thirty")}


def test_bad_edit_rows_have_their_causes_and_a_blank_step_is_never_chosen(tmp_path, open_source):
    pair = [picture(1), picture(2)]
    rows = [
        (pair, [["go"]]),
        (pair, [[" "]]),
        (pair, []),
        (pair, None),
        (pair[:1], [["go"]]),
        (None, [["go"]]),
        ([picture()[:50], picture()], [["go"]]),
        ([None, picture()], [["go"]]),
        ([*pair, picture(3)], [[], ["go"]]),
    ]
    schema = pa.schema(
        [
            ("image_list", pa.list_(pa.binary())),
            ("instruction_list", pa.list_(pa.list_(pa.string()))),
        ]
    )
    pq.write_table(
        pa.Table.from_pylist([dict(zip(schema.names, row)) for row in rows], schema=schema),
        tmp_path / "a.parquet",
    )
    source = open_source(tmp_path)
    assert read(source, 0).captions == []
    assert [cause(source, row) for row in range(1, 8)] == [
        *["missing_instruction"] * 3,
        *["missing_image"] * 2,
        "undecodable_image",
        "missing_image",
    ]
    assert {shade_of(read(source, 8, seed).source) for seed in range(8)} == {2}


def test_conversations_keep_the_order_of_texts_and_images(tmp_path, open_source):
    turns = talk("Look: <image> and <image>\nSame?") + talk("Sure?", "Yes.")
    lines = [
        {"image": ["a.png", "b.png"], "conversations": turns},
        "",
        {"conversations": talk("Hello?")},
        {"image": "a.png", "conversations": json.dumps(talk())},
    ]
    path = write_lines(tmp_path, lines, {"a.png": picture(1), "b.png": picture(2)})
    source = open_source(path)
    assert (len(source), source.layout) == (3, "vlm")
    example = read(source, 0)
    assert isinstance(example, Conversation) and [role for role, _ in example.turns] == [
        "human",
        "gpt",
        "human",
        "gpt",
    ]
    parts = [part if isinstance(part, str) else shade_of(part) for part in example.turns[0][1]]
    assert parts == ["Look:", 1, "and", 2, "Same?"] and example.turns[3][1] == ["Yes."]
    assert read(source, 1).turns == [("human", ["Hello?"]), ("gpt", ["A cup."])]
    assert read(source, 2).turns[1] == ("gpt", ["A cup."])


def test_bad_conversation_rows_have_their_causes_and_line_numbers_stay_right(tmp_path, open_source):
    lines = [
        "{broken",
        {"image": "missing.png", "conversations": talk()},
        {"image": "../secret.png", "conversations": talk()},
        {"image": ["a.png", "a.png"], "conversations": talk("one <image> of two")},
        {"conversations": talk()},
        {"image": "a.png", "conversations": []},
        {"image": "a.png", "conversations": talk(gpt=" ")},
        {"image": "a.png", "conversations": talk()[:1]},
        {"image": "a.png"},
        "[1, 2]",
        {"image": "a.png", "conversations": [{"from": "tool", "value": "<image>"}]},
        {"image": 5, "conversations": talk()},
        {"image": "a.png", "conversations": talk()},
    ]
    path = write_lines(tmp_path / "set", lines)
    (tmp_path / "set/secret.png").write_bytes(picture())
    source = open_source(path)
    assert [cause(source, row) for row in range(12)] == [
        "bad_json",
        "missing_image",
        "missing_image",
        "image_count",
        "image_count",
        "no_conversation",
        "missing_answer",
        "missing_answer",
        "no_conversation",
        "bad_json",
        "bad_turn",
        "missing_image",
    ]
    assert read(source, 12).key == f"{source.name}:12"


def test_images_are_looked_for_in_the_named_folder_or_beside_the_file(tmp_path, open_source):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.png").write_bytes(picture(3))
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/x.png").write_bytes(picture(4))
    line = json.dumps({"image": "x.png", "conversations": talk()})
    for name in ("flat", "other"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "rows.jsonl").write_text(line)
    assert shade_of(read(open_source(tmp_path / "flat")).turns[0][1][0]) == 4
    assert (
        shade_of(
            read(open_source(tmp_path / "other", images=str(tmp_path / "elsewhere"))).turns[0][1][0]
        )
        == 3
    )
    with pytest.raises(SettingsError, match="does not exist"):
        open_source(tmp_path / "other", images=str(tmp_path / "nowhere"))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_webdataset_archives_give_their_samples_and_only_broken_ones_are_lost(
    tmp_path, open_source
):
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("000.jpg", picture(60, "JPEG")),
            ("000.txt", b"a cup"),
            ("001.png", picture(61)),
            ("001.json", CAPTIONS.encode()),
            ("002.webp", picture(62, "WEBP")),
            ("002.json", b"{broken"),
            ("003.png", picture(63)),
            ("004.txt", b"no image"),
            ("dir/005.png", picture(65)),
            ("dir/005.json", json.dumps({"caption": "in a folder"}).encode()),
        ],
    )
    source = open_source(path)
    assert (len(source), source.layout) == (6, "t2i")
    assert abs(shade_of(read(source, 0).image) - 60) < 4 and read(source, 0).captions == ["a cup"]
    assert [cause(source, row) for row in (2, 3, 4)] == ["bad_json", "no_caption", "missing_image"]
    assert read(source, 5).captions == ["in a folder"] and shade_of(read(source, 5).image) == 65


@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a/../../x.png"])
def test_an_archive_with_members_that_point_out_of_it_is_refused(tmp_path, open_source, name):
    write_tar(tmp_path / "a.tar", [(name, picture()), (name.replace("png", "txt"), b"a cup")])
    write_tar(tmp_path / "b.tar", [("x.png", picture()), ("x.txt", b"a cup")])
    source = open_source(tmp_path)
    assert (
        len(source) == 1
        and "points out of the archive" in source.unreadable_files[str(tmp_path / "a.tar")]
    )


def test_a_truncated_archive_is_skipped(tmp_path, open_source):
    members = [
        (f"{row}.{kind}", body)
        for row in range(3)
        for kind, body in (("png", picture()), ("txt", b"a cup"))
    ]
    data = write_tar(tmp_path / "b.tar", members).read_bytes()
    for name, length in (
        ("a.tar", 1300),
        ("c.tar", 600),
        ("d.tar", 100),
        ("e.tar", 1024 + 512 + 2),
    ):
        (tmp_path / name).write_bytes(data[:length])
    source = open_source(tmp_path)
    assert len(source) == 3 and [Path(name).name for name in source.unreadable_files] == [
        "a.tar",
        "c.tar",
        "d.tar",
        "e.tar",
    ]


def test_sources_that_cannot_work_are_refused_in_one_line_with_name_and_path(tmp_path, open_source):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.parquet").write_bytes(b"PAR1")
    (tmp_path / "strange").mkdir()
    pq.write_table(pa.table({"x": [1], "y": [2]}), tmp_path / "strange/a.parquet")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow/a.jsonl").write_text("\n\n")
    for name, words in (
        ("empty", "no parquet"),
        ("absent", "no parquet"),
        ("broken", "none of its 1 files"),
        ("strange", "layout cannot be inferred"),
        ("hollow", "no rows"),
    ):
        with pytest.raises(SettingsError) as caught:
            open_source(tmp_path / name, name="mine")
        message = str(caught.value)
        assert (
            words in message
            and "'mine'" in message
            and str(tmp_path / name) in message
            and "\n" not in message
        )
    with pytest.raises(SettingsError, match="scenes/edit"):
        open_source("scenes/edits")


def test_a_folder_of_several_layouts_is_refused_by_name_unless_one_is_asked_for(
    tmp_path, open_source
):
    write_t2i(tmp_path / "mixed" / "00000.parquet", [{"image": picture(), "captions": CAPTIONS}])
    write_lines(tmp_path / "mixed", [{"image": "a.png", "conversations": talk()}])
    with pytest.raises(
        SettingsError,
        match=r"different layouts: t2i \(00000.parquet\), vlm \(conversations.jsonl\)",
    ):
        open_source(tmp_path / "mixed")
    assert open_source(tmp_path / "mixed", layout="t2i").layout == "t2i"


def test_bad_first_rows_do_not_hide_the_layout(tmp_path, open_source):
    path = write_lines(tmp_path, ["{broken", {"image": "a.png", "conversations": talk()}])
    assert open_source(path).layout == "vlm"


def test_check_usable_passes_over_bad_rows_and_counts_the_causes_when_none_is_good(
    tmp_path, open_source
):
    path = write_lines(
        tmp_path,
        [
            "{broken",
            {"image": "no.png", "conversations": talk()},
            {"image": "a.png", "conversations": talk()},
        ],
    )
    source, seen = open_source(path), []
    check_usable(source, seen.append)
    assert [example.key for example in seen] == [f"{source.name}:2"]

    def too_long(_):
        raise BadRow("too_long")

    with pytest.raises(SettingsError) as caught:
        check_usable(source, too_long)
    assert all(
        words in str(caught.value)
        for words in (source.name, "bad_json 1", "missing_image 1", "too_long 1")
    )


@pytest.mark.parametrize(
    "name, kind", [("t2i", TextToImage), ("edit", Edit), ("vlm", Conversation)]
)
def test_the_embedded_sets_are_read_through_the_same_path(open_source, name, kind):
    source = open_source(f"scenes/{name}")
    assert (source.name, source.layout) == (f"scenes/{name}", name)
    examples = [read(source, row) for row in range(len(source))]
    assert all(isinstance(example, kind) for example in examples) and len(examples) == (
        3 if name == "vlm" else 12
    )
    assert name != "edit" or all(example.captions for example in examples)


def test_a_source_can_be_sent_to_a_worker_process(tmp_path, open_source):
    write_t2i(tmp_path / "a.parquet", [{"image": picture(5), "captions": CAPTIONS}])
    assert shade_of(read(pickle.loads(pickle.dumps(open_source(tmp_path)))).image) == 5


KEYS = st.sampled_from(["from", "value", "bytes", "path", "x"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["a.png", "<image>", "human", "gpt"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
COLUMNS = st.sampled_from(
    [
        "image",
        "captions",
        "caption",
        "image_list",
        "instruction_list",
        "caption_list",
        "conversations",
    ]
)
LINES = st.dictionaries(COLUMNS, VALUES).map(json.dumps) | st.text(
    alphabet='{}[]",:ab01é', min_size=1, max_size=30
)


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(LINES, min_size=1, max_size=8))
def test_any_json_line_gives_an_example_or_a_bad_row_in_every_layout(tmp_path, open_source, lines):
    path = write_lines(tmp_path, [*lines, "{broken"])
    for layout in ("t2i", "edit", "vlm"):
        source = open_source(path, layout=layout)
        for row in range(len(source)):
            try:
                read(source, row)
            except BadRow:
                pass


@pytest.mark.parametrize("loss", ["gone", "cut"])
@pytest.mark.parametrize("kind", ["jsonl", "tar", "arrow"])
def test_a_file_that_goes_away_or_is_cut_while_it_is_read_costs_its_own_rows_and_is_named(
    open_source, tmp_path, kind, loss
):
    paths = []
    for number in range(2):
        if kind == "jsonl":
            rows = [
                {
                    "image": "a.png",
                    "conversations": [
                        {"from": "human", "value": "<image>?"},
                        {"from": "gpt", "value": "!"},
                    ],
                }
            ] * 3
            paths.append(write_lines(tmp_path / "data" / str(number), rows))
        elif kind == "tar":
            paths.append(tmp_path / "data" / f"{number}.tar")
            paths[-1].parent.mkdir(exist_ok=True)
            with tarfile.open(paths[-1], "w") as archive:
                for row in range(3):
                    for name, data in ((f"{row}.png", picture()), (f"{row}.txt", b"a cup")):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
        else:
            paths.append(tmp_path / "data" / f"{number}.arrow")
            paths[-1].parent.mkdir(exist_ok=True)
            table = pa.table({"image": [picture()] * 3, "captions": [CAPTIONS] * 3})
            with (
                pa.OSFile(str(paths[-1]), "wb") as sink,
                pa.ipc.new_stream(sink, table.schema) as writer,
            ):
                writer.write_table(table)
    source = open_source(tmp_path / "data")
    rng = np.random.default_rng(0)
    assert (
        len(source) == 6
        and all(source.read(index, rng) for index in range(6))
        and not source.lost_files
    )
    if loss == "gone":
        paths[0].unlink()
    else:
        os.truncate(paths[0], paths[0].stat().st_size // 2)
    for index in range(3):
        with pytest.raises(BadRow, match=f"lost_file: .*{paths[0].name}"):
            source.read(index, rng)
    assert all(source.read(index, rng) for index in range(3, 6))
    (reason,) = source.lost_files.values()
    assert (
        list(source.lost_files) == [str(paths[0])]
        and ("No such file" if loss == "gone" else "bytes instead of") in reason
    )
