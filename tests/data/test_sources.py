"""Sources as a whole: whatever is wrong with a row or a file costs that row or file only, and a
source that cannot work is refused."""

import json
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from shaded_rows import CAPTIONS, picture, read, shade_of, talk, write_lines
from small_runs import write_t2i
from source_files import archive

from uno_ds.data.images import BadRow
from uno_ds.data.layouts.conversation import Conversation
from uno_ds.data.layouts.edit import Edit
from uno_ds.data.layouts.text_to_image import TextToImage
from uno_ds.data.source_checks import check_usable
from uno_ds.settings import SettingsError


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
            rows = [{"image": "a.png", "conversations": talk("<image>?", "!")}] * 3
            paths.append(write_lines(tmp_path / "data" / str(number), rows))
        elif kind == "tar":
            paths.append(tmp_path / "data" / f"{number}.tar")
            paths[-1].parent.mkdir(exist_ok=True)
            members = {}
            for row in range(3):
                members |= {f"{row}.png": picture(), f"{row}.txt": b"a cup"}
            archive(paths[-1], members)
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
