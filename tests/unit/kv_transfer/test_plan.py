from dataclasses import replace

import pytest

from baton.core.errors import GeometryMismatch
from baton.core.ids import BlockId
from baton.core.tickets import Geometry
from baton.kv_transfer.plan import Parcel, next_parcel, require_same

GEOMETRY = Geometry(num_layers=2, num_kv_heads=1, head_size=64, block_tokens=16, dtype="float32", fingerprint="m")
TABLE = [BlockId(block) for block in (7, 3, 9, 1)]


def test_equal_geometries_may_exchange() -> None:
    require_same(GEOMETRY, replace(GEOMETRY))


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 3},
        {"first_layer": 16},
        {"num_kv_heads": 2},
        {"head_size": 32},
        {"block_tokens": 32},
        {"dtype": "bfloat16"},
        {"fingerprint": "another model"},
    ],
)
def test_any_difference_is_refused_and_named(change: dict[str, object]) -> None:
    with pytest.raises(GeometryMismatch) as refusal:
        require_same(GEOMETRY, replace(GEOMETRY, **change))
    assert all(str(value) in str(refusal.value) for value in change.values())


def test_a_parcel_holds_what_is_wanted_complete_and_not_announced_yet() -> None:
    assert next_parcel({1, 2, 3}, {1}, TABLE, complete=3) == Parcel((2,), (BlockId(9),))


def test_a_parcel_may_be_empty() -> None:
    assert next_parcel({3}, set(), TABLE, complete=3) == Parcel((), ())
