"""Interleaved rows: parts are read with their roles and switches, bad ones are counted by cause,
and a prepared row gives the same sample as its raw one."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from small_runs import encoded, picture, random_base, tree

from uno_ds.commands import prepare as prepare_command
from uno_ds.commands import train
from uno_ds.commands.fake_ranks import synthetic_batch
from uno_ds.cost.scenario import fullest_packs
from uno_ds.data.images import BadRow
from uno_ds.data.parts import ImagePart, TextPart
from uno_ds.data.sources import Source, SourceSettings
from uno_ds.run import prepare
from uno_ds.sequence.segments import Kind
from uno_ds.settings import build


def image(seed: int) -> bytes:
    return encoded(picture(seed=seed), "PNG")


def opened(path: Path, **values) -> Source:
    settings = build(SourceSettings, {"path": str(path), **values})
    return Source(settings, cache=path.parent / "cache")


def read(source: Source, index: int = 0):
    return source.read(index, np.random.default_rng(0))


def plain(example) -> list:
    """(texts, loss) of a text; (seed of the picture, generate, views, captions) of an image."""
    found = []
    for part in example.parts:
        if isinstance(part, TextPart):
            found.append((part.texts, part.loss))
            continue
        seeds = [seed for seed in range(9) if part.image.tobytes() == picture(seed=seed).tobytes()]
        found.append((*seeds, part.generate, part.views, part.captions))
    return found


EDITS = [
    {"image": image(0)},
    {"text": "make it red"},
    {"image": image(1), "role": "assistant", "captions": ["a red cup", "a cup"]},
    {"text": ["turn it", "rotate it"]},
    {"image": image(2), "generate": True, "views": "vit"},
]
READ = [
    (0, False, None, []),
    (["make it red"], False),
    (1, True, None, ["a red cup", "a cup"]),
    (["turn it", "rotate it"], False),
    (2, True, "vit", []),
]


def write_parquet(path: Path, rows: list[list[dict]]) -> Path:
    keys = ("text", "image", "role", "loss", "generate", "views", "captions")
    full = []
    for parts in rows:
        texts = [part.get("text") for part in parts]
        lists = [[text] if isinstance(text, str) else text for text in texts]
        full.append(
            [
                {key: part.get(key) for key in keys} | {"text": wordings}
                for part, wordings in zip(parts, lists, strict=True)
            ]
        )
    part_type = pa.struct(
        [
            ("text", pa.list_(pa.string())),
            ("image", pa.binary()),
            ("role", pa.string()),
            ("loss", pa.bool_()),
            ("generate", pa.bool_()),
            ("views", pa.string()),
            ("captions", pa.list_(pa.string())),
        ]
    )
    schema = pa.schema([("parts", pa.list_(part_type))])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([{"parts": parts} for parts in full], schema=schema), path)
    return path


def write_lines(path: Path, *rows: dict) -> Path:
    for seed in range(4):
        (path.parent / f"{seed}.png").write_bytes(image(seed))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def with_files(parts: list[dict], names: list) -> list[dict]:
    remaining = iter(names)
    return [{**part, "image": next(remaining)} if "image" in part else part for part in parts]


def test_rows_of_a_table_with_a_struct_of_lines_with_files_and_of_an_archive(tmp_path):
    source = opened(write_parquet(tmp_path / "a.parquet", [EDITS]))
    assert source.layout == "interleaved" and plain(read(source)) == READ
    assert "parts = parts; first text 'make it red'" in source.reading.line()

    files = with_files(EDITS, ["0.png", "1.png", "2.png"])
    numbers = with_files(EDITS, [1, 2, 0])
    row = {"images": ["2.png", "0.png", "1.png"], "parts": numbers}
    lines = write_lines(tmp_path / "a.jsonl", {"parts": files}, row, {"parts": json.dumps(files)})
    source = opened(lines)
    assert [plain(read(source, index)) for index in range(3)] == [READ] * 3

    members = {f"0.{seed}.png": image(seed) for seed in range(3)}
    members["0.json"] = json.dumps({"parts": files}).encode()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    source = opened(tmp_path / "a.tar")
    assert len(source) == 1 and plain(read(source)) == READ


def test_roles_set_what_is_trained_and_switches_overrule_them(tmp_path):
    parts = [
        {"role": "system", "text": "Be brief."},
        {"role": "user", "text": "Draw a cup."},
        {"role": "assistant", "text": "I think of a cup."},
        {"role": "assistant", "text": "Not this one.", "loss": False},
        {"role": "gpt", "image": "0.png"},
        {"role": "Assistant", "image": "1.png", "generate": False, "views": "latents"},
        {"text": "Why?", "loss": True},
    ]
    source = opened(write_lines(tmp_path / "a.jsonl", {"parts": parts}))
    assert plain(read(source)) == [
        (["Be brief."], False),
        (["Draw a cup."], False),
        (["I think of a cup."], True),
        (["Not this one."], False),
        (0, True, None, []),
        (1, False, "latents", []),
        (["Why?"], True),
    ]


def test_messages_are_read_as_parts_where_a_source_asks_for_it(tmp_path):
    messages = [
        {"role": "user", "content": [{"type": "image", "path": "0.png"}, {"text": "Make it red."}]},
        {"role": "assistant", "content": [{"type": "image", "path": "1.png"}]},
    ]
    path = write_lines(tmp_path / "a.jsonl", {"messages": messages})
    assert opened(path).layout == "vlm"
    source = opened(path, layout="interleaved")
    expected = [(0, False, None, []), (["Make it red."], False), (1, True, None, [])]
    assert plain(read(source)) == expected


BAD = {
    "no_parts": [],
    "no_target": [{"image": "0.png"}, {"text": "make it red"}],
    "missing_image": [{"image": "9.png"}, {"image": "0.png", "generate": True}],
    "missing_image ": [{"type": "image", "role": "assistant"}],
    "missing_image  ": [{"image": 4, "generate": True}],
    "unknown_role": [{"role": "tool", "text": "a"}, {"image": "0.png", "generate": True}],
    "bad_part": [{"text": "a", "image": "0.png", "generate": True}],
    "bad_part ": [{"text": " ", "loss": True}],
    "bad_part  ": [{"image": "0.png", "generate": "yes"}],
    "bad_part   ": [{"image": "0.png", "generate": True, "views": "all"}],
    "bad_part    ": [{"image": "0.png", "genrate": True}],
    "bad_part     ": [{"text": "a", "generate": True}],
    "bad_part      ": [{"image": "0.png", "generate": True, "loss": True}],
    "bad_part       ": ["a cup"],
    "bad_part        ": [{"text": 5, "loss": True}],
    "bad_json": "[{",
}


def test_bad_parts_have_their_causes(tmp_path):
    rows = [{"parts": [{"text": "a", "loss": True}]}, *({"parts": parts} for parts in BAD.values())]
    source = opened(write_lines(tmp_path / "a.jsonl", *rows))
    assert plain(read(source)) == [(["a"], True)]
    causes = []
    for index in range(1, len(source)):
        with pytest.raises(BadRow) as caught:
            read(source, index)
        causes.append(caught.value.cause)
    assert causes == [name.strip() for name in BAD]


THINK = [
    {"text": "draw a red cup"},
    {"text": "the cup is red", "role": "assistant"},
    {"image": image(3), "role": "assistant", "captions": ["a red cup on a table"]},
    {"text": "what is it?"},
    {"text": "a cup", "role": "assistant"},
]
REFERENCES = [
    {"image": image(0), "views": "vit"},
    {"image": image(1), "views": "latents"},
    {"image": image(2)},
    {"text": "put the first on the second"},
    {"image": image(3), "generate": True},
]
QUESTION = [{"image": image(0)}, {"text": "what is it?"}, {"text": "a cup", "role": "assistant"}]


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """Ten rows, one of them unusable; its base is at base/."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    broken = [{"image": b"broken", "generate": True}]
    rows = [EDITS, THINK, REFERENCES, QUESTION] * 2 + [EDITS, broken]
    write_parquet(tmp_path / "data/a.parquet", rows)
    base = str(random_base(tmp_path / "base"))
    plain_recipe = tree(tmp_path, [tmp_path / "data"], model={"base": base})
    del plain_recipe["model"]["architecture"], plain_recipe["model"]["tokenizer"]
    plain_recipe["sequence"] |= {"conversation_images": "random", "token_budget": 900}
    plain_recipe["data"]["sources"][0]["name"] = "data"
    plain_recipe["objective"] |= {"answer_weight": 0.5}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain_recipe))
    return path


def packs(run, number: int = 6) -> list:
    stream = run.stream(0, 1)
    found = [batches[0] for _, batches in zip(range(number), stream, strict=False)]
    stream.close()
    return found


def test_the_layout_is_known_to_preparation_the_dry_run_and_the_cost_model(recipe, capsys):
    run = prepare(str(recipe))
    assert run.layouts == [("data", "interleaved")] and not run.idle and run.read_answers
    raw = packs(run)
    for loss in ("flow", "caption", "regression", "answer"):
        assert sum(batch.loss_counts[loss] for batch in raw) > 0
    out = recipe.parent / "out"
    assert prepare_command.main(["--recipe", str(recipe), "--out", str(out)]) == 0
    assert "unusable rows: undecodable_image 1" in capsys.readouterr().out
    ready = f"data.sources=[{{path: {out / '0_interleaved'}, name: data}}]"
    for batch, same in zip(raw, packs(prepare(str(recipe), [ready])), strict=True):
        assert batch.keys == same.keys and batch.loss_counts == same.loss_counts
        assert torch.equal(batch.text_ids, same.text_ids)
        assert torch.equal(batch.order_T, same.order_T) and torch.equal(batch.rope_T, same.rope_T)
    # Rows prepared with both views serve each of them, and rows prepared with one do not.
    prepare(str(recipe), [ready, "sequence.conversation_images=latents"])

    (pack,) = fullest_packs(run.recipe, ["interleaved"]).values()
    assert pack.latents and pack.clean and pack.vit and pack.metaqueries == 4 and pack.caption
    counts = synthetic_batch(run.recipe, ["interleaved"]).loss_counts
    assert all(counts[loss] for loss in ("flow", "caption", "regression", "answer"))
    assert train.main(["--recipe", str(recipe), "--dry-run", "--json"]) == 0
    assert '"interleaved"' in capsys.readouterr().out


def test_views_and_switches_of_rows_become_segments(recipe):
    nothing_dropped = [f"sequence.drop_{what}=0" for what in ("text", "vit", "latent")]
    supervised = ["sequence.supervised_fraction=1", "sequence.conversation_images=vit"]
    run = prepare(str(recipe), nothing_dropped + supervised)
    rng = np.random.default_rng(0)
    samples = [
        run.make_sample(run.sources[0].read(row, np.random.default_rng(0)), rng) for row in range(4)
    ]
    text, vit, clean = Kind.TEXT, Kind.VIT, Kind.CLEAN
    noised, caption, queries = Kind.NOISED, Kind.CAPTION, Kind.METAQUERY
    kinds = [[segment.kind for segment in sample.segments] for sample in samples]
    first_edit = [clean, vit, text, noised, caption, queries, clean, vit]
    assert kinds[0] == [*first_edit, text, noised, queries]
    assert kinds[1] == [text, text, noised, caption, queries, clean, vit, text, text]
    assert kinds[2] == [vit, clean, clean, vit, text, noised, queries]
    assert kinds[3] == [vit, text, text]
    answers = [[segment.answer for segment in sample.segments] for sample in samples]
    assert [sum(flags) for flags in answers] == [0, 2, 0, 1] and answers[1][1] and answers[1][-1]


def test_too_long_rows_are_left_out_and_none_is_cut(recipe):
    run = prepare(str(recipe))
    limit = run.recipe.sequence.token_budget
    lengths = {len(batch.order_T) for batch in packs(run)}
    assert max(lengths) <= limit
    long = ImagePart(picture(seed=0), True, None, [])
    example = type(read_example(run))("key", [long] * 40)
    with pytest.raises(BadRow, match="tokens, the budget is 900") as caught:
        run.make_sample(example, np.random.default_rng(0))
    assert caught.value.cause == "too_long_for_budget"


def read_example(run):
    return run.sources[0].read(0, np.random.default_rng(0))
