"""Data sets of the hub that are streamed: from a local stand-in of the hub, each row once in an
epoch, and after a restart exactly the rows that were left, in their order."""

import base64
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import run_script, serving
from public_rows import lines, parquet
from shaded_rows import picture

from uno_ds.data import streamed
from uno_ds.data.lane_states import check_states
from uno_ds.data.sources import SourceSettings
from uno_ds.data.stream import Lane, Stream
from uno_ds.data.streamed import StreamedSource
from uno_ds.sequence.segments import Kind, Sample, Segment
from uno_ds.settings import SettingsError, build

FILES, ROWS, LANES = 3, 5, 2  # of the data set, of each file, of a step
HUB = "hf://datasets/them/cups"


def caption(number: int) -> str:
    return f"cup number {number}"


ALL = [caption(number) for number in range(FILES * ROWS)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("hub")
    paths = []
    for file in range(FILES):
        numbers = range(file * ROWS, (file + 1) * ROWS)
        rows = [
            {"image": {"bytes": picture(n), "path": None}, "prompt": caption(n)} for n in numbers
        ]
        paths.append(str(parquet(folder / f"data/train-{file:05d}.parquet", *rows)))
    return paths


def local_source(files: list[str], patch: pytest.MonkeyPatch, **settings: Any) -> StreamedSource:
    """The files without the hub."""
    import datasets

    def opened(address: Any, settings: Any) -> Any:
        splits = datasets.load_dataset("parquet", data_files={"train": files}, streaming=True)
        return splits["train"].decode(False)

    patch.setattr(streamed, "_open", opened)
    return StreamedSource(build(SourceSettings, {"path": HUB, "streaming": True, **settings}))


@pytest.fixture(scope="module")
def source(files: list[str]):
    with pytest.MonkeyPatch.context() as patch:
        yield local_source(files, patch)


def make_sample(example: Any, rng: np.random.Generator) -> Sample:
    length = 5 + int(rng.integers(7))
    return Sample(example.captions[0], [Segment(Kind.TEXT, np.arange(length))])


def keys_and_lengths(samples: list[Sample]) -> list[tuple[str, int]]:
    return [(sample.key, sample.length) for sample in samples]


def stream(source: StreamedSource, rank: int, ranks: int, **options: Any) -> Stream:
    make: Any = make_sample
    collate: Any = keys_and_lengths
    lanes = [Lane(n, LANES, [source], make, 0, 30, None) for n in range(rank, LANES, ranks)]
    return Stream(lanes, collate, **{"prefetch": 0, **options})


def take(of: Stream, steps: int) -> list[list[Any]]:
    taken = list(itertools.islice(iter(of), steps))
    of.close()
    return taken


def test_every_row_comes_once_in_an_epoch_over_all_lanes_and_epochs_differ(source):
    epochs: list[list[str]] = [[], []]
    for lane in range(LANES):
        rows = source.lane_rows(lane, LANES, seed=0)
        while (row := rows.next()).after["epoch"] < 2:
            epochs[row.after["epoch"]].append(row.columns["prompt"])
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(ALL)
    assert epochs[0] != epochs[1]
    other = source.lane_rows(0, LANES, seed=1)
    assert [other.next().columns["prompt"] for _ in range(4)] != epochs[0][:4]


def test_rows_go_on_from_the_state_before_or_after_any_of_them(source):
    rows = source.lane_rows(1, LANES, seed=3)
    drawn = [rows.next() for _ in range(2 * FILES * ROWS // LANES + 3)]
    prompts = [row.columns["prompt"] for row in drawn]
    assert len({row.after["epoch"] for row in drawn}) == 3
    for place, row in enumerate(drawn[:-1]):
        again = source.lane_rows(1, LANES, seed=3)
        again.restore(json.loads(json.dumps(row.before)))
        assert again.next().columns["prompt"] == prompts[place]
        again.restore(json.loads(json.dumps(row.after)))
        assert again.next().columns["prompt"] == prompts[place + 1]


@pytest.mark.parametrize("options", [{}, {"prefetch": 2, "workers": 3}], ids=["plain", "ahead"])
def test_a_run_gets_the_same_packs_on_one_and_two_ranks_and_exactly_the_rest_after_a_restart(
    source, options: dict
):
    whole = take(stream(source, 0, 1), 9)
    names = Counter(key for packs in whole for pack in packs for key, _ in pack)
    # No row is drawn again before the others of its epoch.
    assert set(names) == set(ALL) and max(names.values()) == min(names.values()) + 1 > 2
    for rank in range(2):
        assert take(stream(source, rank, 2, **options), 9) == [packs[rank::2] for packs in whole]
    for steps in range(1, 8):
        states: dict[str, Any] = {}
        for rank in range(2):
            first = stream(source, rank, 2, **options)
            take(first, steps)
            states |= json.loads(json.dumps(first.state))
        for ranks in (1, 2):
            for rank in range(ranks):
                second = stream(source, rank, ranks, **options)
                second.restore(states)
                expected = [packs[rank::ranks] for packs in whole[steps:]]
                assert take(second, 9 - steps) == expected, (steps, ranks)


class WithSupervision:
    """Makes longer samples until supervision ends."""

    def __call__(self, example: Any, rng: np.random.Generator) -> Sample:
        return Sample(example.captions[0], [Segment(Kind.TEXT, np.arange(13))])

    def unsupervised(self) -> Any:
        return make_sample


@pytest.mark.parametrize("ahead", [0, 5])
def test_the_end_of_supervision_loses_no_row_that_was_read_ahead_or_waits(source, ahead):
    def lane() -> Lane:
        make: Any = WithSupervision()
        made = Lane(0, LANES, [source], make, 0, 30, None)
        made.ahead = ahead
        return made

    whole, ending = lane(), lane()
    expected = [sample.key for _ in range(12) for sample in whole.next_pack()]
    keys = [sample.key for _ in range(3) for sample in ending.next_pack()]
    assert ending.waiting
    ending.end_supervision()
    packs = [ending.next_pack() for _ in range(4)]
    assert max(sample.length for pack in packs for sample in pack) < 13
    keys += [sample.key for pack in packs for sample in pack]
    assert keys == expected[: len(keys)]


def test_layout_and_columns_come_from_the_first_rows(source, files, monkeypatch):
    assert (source.layout, source.name, source.reading.rows) == ("t2i", "them/cups", None)
    assert source.reading.line().startswith("is read as streamed rows of layout t2i; image = image")
    wrong = {"layout": "t2i", "columns": {"caption": "words"}}
    with pytest.raises(
        SettingsError, match="caption is to be read from words, and its columns are"
    ):
        local_source(files, monkeypatch, **wrong)
    with pytest.raises(SettingsError, match="its rows are streamed, and this needs all of them"):
        source.digest()


def test_fewer_rows_than_lanes_and_broken_files_are_one_line(files, tmp_path, monkeypatch):
    row = {"image": picture(1), "prompt": "a cup"}
    single = local_source([str(parquet(tmp_path / "one.parquet", row))], monkeypatch)
    assert single.lane_rows(0, 2, 0).next().columns["prompt"] == "a cup"
    with pytest.raises(SettingsError, match="it has fewer rows than there are packs in a step"):
        single.lane_rows(1, 2, 0).next()
    lost = parquet(tmp_path / "lost.parquet", *[row] * 3)
    source = local_source([str(lost)], monkeypatch)
    lost.write_bytes(b"nothing of the kind")
    with pytest.raises(SettingsError) as raised:
        source.lane_rows(0, 1, 0).next()
    assert "reading its rows failed: " in str(raised.value) and "\n" not in str(raised.value)


def test_a_checkpoint_of_a_streamed_source_does_not_go_on_without_and_the_other_way_round(source):
    states = {str(n): stream(source, 0, 1).lanes[n].state() for n in range(LANES)}
    check_states(states, [source], LANES)
    plain = {name: {k: v for k, v in s.items() if k != "streams"} for name, s in states.items()}
    with pytest.raises(SettingsError, match=r"data.sources.0.streaming: is true, but .* false"):
        check_states(plain, [source], LANES)


def test_streaming_is_for_the_hub_alone(tmp_path):
    with pytest.raises(SettingsError, match="streaming: is for hf://datasets/ORG/NAME; the files"):
        build(SourceSettings, {"path": str(tmp_path), "streaming": True})


READ = """
import json, sys
import numpy as np
from uno_ds.data.sources import SourceSettings
from uno_ds.data.streamed import StreamedSource
from uno_ds.settings import SettingsError, build
lanes, jobs = json.loads(sys.argv[1])
found = []
for path, count, states in jobs:
    try:
        source = StreamedSource(build(SourceSettings, {"path": path, "streaming": True}))
    except SettingsError as error:
        found.append(str(error))
        continue
    given = []
    for lane in range(lanes):
        rows = source.lane_rows(lane, lanes, 0)
        if states:
            rows.restore(states[lane])
        drawn = [rows.next() for _ in range(count)]
        examples = [source.read_row(0, row.columns, np.random.default_rng(0)) for row in drawn]
        shades = [example.image.getpixel((3, 3))[0] for example in examples]
        given.append([[example.captions[0] for example in examples], rows.state, shades])
    found.append(given)
print(json.dumps(found))
"""


def read(address: str, home: Path, *jobs: tuple[str, int, Any]) -> list[Any]:
    """Of each job (path, rows, states) and each lane the captions of the rows, the state after them
    and the shades of their pictures."""
    return run_script(READ, address, home, json.dumps([LANES, jobs]))


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_streamed_and_goes_on_in_another_process(files, tmp_path):
    folder = Path(files[0]).parents[1]
    picture_text = "data:image/png;base64," + base64.b64encode(picture()).decode()
    talk = [{"image": picture_text, "prompt": f"mug number {number}"} for number in range(6)]
    lines(folder / "talk/rows.jsonl", *talk)
    for number in range(2):
        (folder / "folder").mkdir(exist_ok=True)
        (folder / f"folder/{number}.png").write_bytes(picture(number))
    names = [{"file_name": f"{number}.png", "text": f"of file {number}"} for number in range(2)]
    lines(folder / "folder/metadata.jsonl", *names)
    with serving(folder) as (address, requests):
        home = tmp_path / "home"
        mugs = "hf://datasets/them/mugs"
        sources = f"{HUB}/data", f"{HUB}/talk/rows.jsonl", mugs
        jobs = (sources[0], 3, None), (sources[0], 7, None), (sources[1], 3, None), (mugs, 1, None)
        pictures = (f"{HUB}/folder", 1, None)
        first, whole, texts, missing, of_files = read(address, home, *jobs, pictures)
        assert sorted(prompt for prompts, *_ in texts for prompt in prompts) == [
            row["prompt"] for row in talk
        ]
        assert sorted((prompts[0], shades[0]) for prompts, _, shades in of_files) == [
            ("of file 0", 0),
            ("of file 1", 1),
        ]
        assert missing.startswith("path: 'hf://datasets/them/mugs' cannot be streamed: ")
        assert "\n" not in missing
        (rest,) = read(address, home, (sources[0], 4, [state for _, state, _ in first]))
        for lane in range(LANES):
            assert first[lane][0] + rest[lane][0] == whole[lane][0]
        drawn = [prompt for prompts, *_ in whole for prompt in prompts]
        assert len(set(drawn)) == len(drawn) == 14 and set(drawn) <= set(ALL)
        assert any(request.endswith(".parquet") for request in requests)
    # No copy of a file is left.
    assert not list(home.rglob("*.parquet")) and not list(home.rglob("blobs/*"))
