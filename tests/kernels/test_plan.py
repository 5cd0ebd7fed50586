"""The attention plan says in ranges and tiles what the dense mask says row by row, and counts
it."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from random_plans import packed_plans

from uno_ds.kernels.plan import LISTS, TABLES, TILED, TILES, UNLIMITED, AttentionPlan, build_plan


def by_table(plan: AttentionPlan, ranges: str, tiles: str, transposed: bool) -> np.ndarray:
    """int [Q, K]: how often the tiles and ranges of a list visit each pair of rows. Cuts no corner
    that a kernel cuts."""
    visits = np.zeros((plan.queries, plan.keys), dtype=np.int64)
    of_run, table = plan.table(f"{ranges}_of_run"), plan.table(ranges)
    for first, stop, run in plan.table(tiles):
        for start, end, reach in table[of_run[run] : of_run[run + 1]]:
            outer, inner = np.arange(first, stop), np.arange(start, end)
            query, key = (
                (inner[:, None], outer[None, :]) if transposed else (outer[:, None], inner[None, :])
            )
            visits[query, key] += key <= query + reach
    return visits


@given(plan=packed_plans())
@hypothesis_settings(max_examples=60, deadline=None)
def test_tiles_and_ranges_visit_every_visible_pair_once_and_no_other(plan):
    visible = plan.visible().numpy()
    need = plan.need_T.numpy()
    live_query, live_key = need[slice(*plan.query_rows)][:, None], need[None, :]
    for size in TILES:
        assert (by_table(plan, "keys", f"query_tiles_{size}", False) == visible).all()
        assert (
            by_table(plan, "keys", f"live_query_tiles_{size}", False) == visible & live_query
        ).all()
        assert (
            by_table(plan, "constant_keys", f"mixed_query_tiles_{size}", False)
            == visible & live_query & ~live_key
        ).all()
        assert (
            by_table(plan, "queries", f"live_key_tiles_{size}", True)
            == visible & live_query & live_key
        ).all()
    counts = [
        int((visible & part).sum())
        for part in (live_query & live_key, live_query & ~live_key, ~live_query & (live_key | True))
    ]
    assert (
        plan.pairs == ((5, counts[0]), (3, counts[1]), (0, counts[2]))
        and plan.visible_pairs == visible.sum()
    )
    assert plan.flops(3, 16) == (
        2 * 2 * 3 * 16 * visible.sum(),
        2 * 3 * 16 * (5 * counts[0] + 3 * counts[1]),
    )


@given(plan=packed_plans())
@hypothesis_settings(max_examples=40, deadline=None)
def test_tiles_cover_each_query_once_straddle_no_segment_and_come_longest_work_first(plan):
    start, stop = plan.query_rows
    visible = plan.visible().numpy()
    for size in TILES:
        rows = [np.arange(first, last) for first, last, _ in plan.table(f"query_tiles_{size}")]
        assert sorted(np.concatenate([np.zeros(0, dtype=int), *rows]).tolist()) == list(
            range(stop - start)
        )
        segments = plan.segment_T.numpy()[start:stop]
        assert all(len(set(segments[tile])) == 1 and len(tile) <= size for tile in rows)
        # Work of a tile is estimated by its run's mean, so only whole runs are compared.
        whole = [
            tile
            for tile, (_, _, run) in zip(rows, plan.table(f"query_tiles_{size}"))
            if (plan.table(f"query_tiles_{size}")[:, 2] == run).sum() == 1
        ]
        work = [int(visible[tile].sum()) for tile in whole]
        assert work == sorted(work, reverse=True)


def dense_text_and_image(samples: int, prompt: int, image: int) -> AttentionPlan:
    lengths = np.tile([prompt, image], samples)
    relation = np.kron(np.eye(samples, dtype=np.int8), np.array([[2, 0], [1, 1]], dtype=np.int8))
    segment = np.repeat(np.arange(2 * samples), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    return build_plan(
        segment,
        position,
        relation,
        np.repeat(np.arange(samples), 2),
        (0, len(segment)),
        segment % 2 == 1,
    )


def test_a_plan_does_not_grow_with_the_square_of_the_tokens():
    sizes = [dense_text_and_image(samples, 100, 1000).tables.numel() for samples in (4, 8, 16)]
    assert sizes[2] < 2.2 * sizes[1] < 4.9 * sizes[0] and sizes[2] * 4 < 40 * 16 * 1100


def test_neighbouring_keys_that_are_seen_alike_are_one_range():
    plan = dense_text_and_image(1, 10, 20)
    assert plan.table("keys").tolist() == [[0, 10, 0], [0, 30, UNLIMITED]]


def test_every_table_begins_at_16_bytes_and_leaves_room_to_read_one_range_past_its_end():
    plan = dense_text_and_image(3, 5, 7)
    assert len(TABLES) == 2 * len(LISTS) + len(TILED) * len(TILES) == len(plan.places)
    assert (plan.places[:, 0] % 4 == 0).all() and (
        plan.places[:, 1] + 3 <= plan.tables.numel()
    ).all()
    assert plan.tables.dtype == torch.int32


def test_moving_a_plan_copies_one_tensor_and_keeps_what_it_says():
    plan = dense_text_and_image(2, 3, 4)
    assert plan.to("cpu") is plan
    moved = plan.to("meta")
    assert (
        moved.tables.device.type == "meta"
        and moved.segment_T is plan.segment_T
        and moved.pairs == plan.pairs
    )
