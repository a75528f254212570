"""Who sends what to whom, for workers of every shape."""

from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from baton.core.errors import GeometryMismatch
from baton.core.ids import BlockId
from baton.core.tickets import KV_WIDTHS, Geometry
from baton.kv_transfer.plan import Parcel, Plan, Side, next_parcel, plan_hand_over, require_bridged

from .shapes import a_side

GEOMETRY = Geometry(num_layers=2, num_kv_heads=1, head_size=64, block_tokens=16, dtype="float32", fingerprint="m")
TABLE = [BlockId(block) for block in (7, 3, 9, 1)]
SIZES = (1, 2, 4, 8)
LAYERS = [(range(4), range(4)), (range(4), range(2)), (range(2), range(1, 4)), (range(8, 12), range(9, 10))]


@pytest.mark.parametrize("change", [{}, {"block_tokens": 32}, {"dtype": "bfloat16"}, {"num_layers": 1}])
def test_what_can_be_bridged_may_be_exchanged(change: dict[str, Any]) -> None:
    require_bridged(GEOMETRY, replace(GEOMETRY, **change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_layers": 3}, "layers: 0 to 1 here, 0 to 2 at the reader"),
        ({"first_layer": 1}, "layers: 0 to 1 here, 1 to 2 at the reader"),
        ({"first_layer": 16}, "none in common"),
        (
            {"num_kv_heads": 2, "head_size": 32},
            "KV heads: 1 here, 2 at the reader; head_size: 64 here, 32 at the reader",
        ),
        ({"dtype": "int8"}, "int8 is not one we know"),
        ({"fingerprint": "another model"}, "model: m here, another model at the reader"),
    ],
)
def test_what_no_copy_can_bridge_is_refused_and_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(GeometryMismatch, match=says):
        require_bridged(GEOMETRY, replace(GEOMETRY, **change))


def test_a_parcel_holds_what_is_wanted_complete_and_not_announced_yet() -> None:
    assert next_parcel({1, 2, 3}, {1}, TABLE, complete=3) == Parcel((2,), (BlockId(9),))


def test_a_parcel_may_be_empty() -> None:
    assert next_parcel({3}, set(), TABLE, complete=3) == Parcel((), ())


def written(plan: Plan) -> Counter[tuple[int, int, int]]:
    """How often each (reader rank, layer, head) of the model is written; the source must hold the same there."""
    found: Counter[tuple[int, int, int]] = Counter()
    for route in plan.routes:
        names = []
        for side, rank, layers, heads in (
            (plan.source, route.source_rank, route.source_layers, route.source_heads),
            (plan.reader, route.reader_rank, route.reader_layers, route.reader_heads),
        ):
            held = side.rank_heads[rank]
            assert 0 <= layers.start < layers.stop <= side.geometry.num_layers
            assert 0 <= heads.start < heads.stop <= len(held)
            names.append([(side.geometry.first_layer + layer, held[head]) for layer in layers for head in heads])
        assert names[0] == names[1]
        found.update((route.reader_rank, layer, head) for layer, head in names[1])
    return found


@pytest.mark.parametrize(("source_tp", "reader_tp"), list(product(SIZES, SIZES)))
def test_each_head_of_each_layer_of_each_rank_is_written_once(source_tp: int, reader_tp: int) -> None:
    for kv_heads, (source_layers, reader_layers) in product(SIZES, LAYERS):
        reader = a_side(reader_tp, kv_heads, reader_layers, block_tokens=64, dtype="bfloat16")
        plan = plan_hand_over(a_side(source_tp, kv_heads, source_layers), reader)
        both = set(source_layers) & set(reader_layers)
        ranks = enumerate(reader.rank_heads)
        assert written(plan) == Counter((rank, layer, head) for rank, held in ranks for head in held for layer in both)


@pytest.mark.parametrize(("source_tp", "reader_tp"), list(product(SIZES, SIZES)))
def test_a_rank_reads_from_as_few_others_as_it_can_and_replicas_share_the_work(source_tp: int, reader_tp: int) -> None:
    for kv_heads in SIZES:
        source, reader = a_side(source_tp, kv_heads), a_side(reader_tp, kv_heads)
        routes = plan_hand_over(source, reader).routes
        for rank, wanted in enumerate(reader.rank_heads):
            parts = {held for held in source.rank_heads if set(held) & set(wanted)}
            assert len([route for route in routes if route.reader_rank == rank]) == len(parts)
        given = Counter(route.source_rank for route in routes)
        for held in set(source.rank_heads):
            shares = [given[rank] for rank, theirs in enumerate(source.rank_heads) if theirs == held]
            assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(("tp", "kv_heads"), list(product(SIZES, SIZES)))
def test_between_equal_sides_each_rank_reads_all_of_its_counterpart(tp: int, kv_heads: int) -> None:
    side = a_side(tp, kv_heads)
    plan = plan_hand_over(side, side)
    assert [(route.source_rank, route.reader_rank) for route in plan.routes] == [(rank, rank) for rank in range(tp)]
    for route in plan.routes:
        assert route.source_layers == route.reader_layers == range(2)
        assert route.source_heads == route.reader_heads == range(max(1, kv_heads // tp))
    assert not plan.converts


@pytest.mark.parametrize(("source_cuts", "reader_cuts"), list(product([(), (4,), (2, 5), (1, 2, 3)], repeat=2)))
def test_stages_that_are_cut_differently_cover_each_layer_once(
    source_cuts: tuple[int, ...], reader_cuts: tuple[int, ...]
) -> None:
    def stages(cuts: tuple[int, ...], tp: int) -> list[Side]:
        ends = zip((0, *cuts), (*cuts, 8), strict=True)
        return [a_side(tp, 4, range(start, stop)) for start, stop in ends]

    for reader in stages(reader_cuts, 8):
        found: Counter[tuple[int, int, int]] = Counter()
        for source in stages(source_cuts, 2):
            if set(source.geometry.layers) & set(reader.geometry.layers):
                found += written(plan_hand_over(source, reader))
        ranks, layers = enumerate(reader.rank_heads), reader.geometry.layers
        assert found == Counter((rank, layer, head) for rank, held in ranks for head in held for layer in layers)


def test_of_odd_ranges_of_heads_the_one_that_reaches_furthest_is_read_then_who_gave_fewest_heads() -> None:
    geometry = a_side(kv_heads=6).geometry
    source = Side(geometry, (range(2), range(4), range(2, 6)))
    reader = Side(geometry, (range(6), range(1, 2), range(2, 3)))
    plan = plan_hand_over(source, reader)
    heads = [(rank, head) for rank, held in enumerate(reader.rank_heads) for head in held]
    assert written(plan) == Counter((rank, layer, head) for rank, head in heads for layer in range(2))
    assert [(route.reader_rank, route.source_rank, route.source_heads) for route in plan.routes] == [
        (0, 1, range(4)),
        (0, 2, range(2, 4)),
        (1, 0, range(1, 2)),  # rank 1 has given four heads, rank 0 none
        (2, 2, range(1)),  # rank 1 has given four, rank 2 two
    ]


@pytest.mark.parametrize(
    "heads", [(), (range(2),), (range(3), range(3, 5)), (range(0), range(4)), (range(0, 4, 3), range(4))]
)
def test_ranks_that_do_not_make_up_a_worker_are_refused(heads: tuple[range, ...]) -> None:
    with pytest.raises(ValueError, match="KV head"):
        Side(a_side(kv_heads=4).geometry, heads)


DIFFERENCES = {
    "model: a model here, another at the reader": {"model": "another"},
    "KV heads: 1 here, 2 at the reader": {"num_kv_heads": 2},
    "head_size: 4 here, 8 at the reader": {"head_size": 8},
    "layers: 0 to 1 here, 2 to 3 at the reader, none in common": {"first_layer": 2},
    "dtype: float32 here, int4 at the reader, and int4 is not one we know": {"dtype": "int4"},
}


@pytest.mark.parametrize("chosen", list(product([False, True], repeat=len(DIFFERENCES))))
def test_a_refusal_names_each_difference_that_cannot_be_bridged_and_no_other(chosen: tuple[bool, ...]) -> None:
    changes: dict[str, object] = {"block_tokens": 64, "fingerprint": "of another dtype"}  # can be bridged
    named = [name for name, there in zip(DIFFERENCES, chosen, strict=True) if there]
    for name in named:
        changes |= DIFFERENCES[name]
    source = a_side()
    geometry = replace(source.geometry, **changes)
    reader = Side(geometry, (range(geometry.num_kv_heads),))
    if not named:
        plan_hand_over(source, reader)
        return
    with pytest.raises(GeometryMismatch) as refusal:
        plan_hand_over(source, reader)
    assert str(refusal.value) == f"the two workers' KV cannot be exchanged ({'; '.join(named)})"


@pytest.mark.parametrize(
    ("said", "fingerprints", "same"),
    [
        (("m", "m"), ("m/f32", "m/bf16"), True),  # one model, whatever its KV is kept in
        (("m", "n"), ("equal", "equal"), False),
        (("m", ""), ("m/f32", "m/f32"), True),  # one does not say: then only the same dtype is surely the same model
        (("", ""), ("m/f32", "m/bf16"), False),
    ],
)
def test_two_workers_have_one_model_if_both_say_so(
    said: tuple[str, str], fingerprints: tuple[str, str], same: bool
) -> None:
    sides = []
    for model, fingerprint in zip(said, fingerprints, strict=True):
        side = a_side()
        sides.append(Side(replace(side.geometry, model=model, fingerprint=fingerprint), side.rank_heads))
    if same:
        plan_hand_over(*sides)
        return
    with pytest.raises(GeometryMismatch, match="model: "):
        plan_hand_over(*sides)


@pytest.mark.parametrize(("source", "reader"), list(product(KV_WIDTHS, KV_WIDTHS)))
def test_what_is_less_exact_than_its_dtype_promises_gets_no_key(source: str, reader: str) -> None:
    plan = plan_hand_over(a_side(dtype=source), a_side(dtype=reader))
    assert plan.converts == (source != reader)
    assert plan.keeps_keys == (list(KV_WIDTHS).index(source) <= list(KV_WIDTHS).index(reader))
