"""Which blocks a hand-over moves, and whether it may. Pure."""

from collections.abc import Collection
from dataclasses import dataclass, fields

from ..core.errors import GeometryMismatch
from ..core.ids import BlockId
from ..core.tickets import Geometry

_UNITS = {
    "num_layers": "layers",
    "num_kv_heads": "KV heads",
    "block_tokens": "tokens per block",
    "first_layer": "first layer",
}


def require_same(source: Geometry, reader: Geometry) -> None:
    """Blocks move between equal geometries only. Raises GeometryMismatch that names every difference."""
    differences = [
        f"{_UNITS.get(f.name, f.name)}: {getattr(source, f.name)} here, {getattr(reader, f.name)} at the reader"
        for f in fields(Geometry)
        if getattr(source, f.name) != getattr(reader, f.name)
    ]
    if differences:
        raise GeometryMismatch("the two workers' KV cannot be exchanged (" + "; ".join(differences) + ")")


@dataclass(frozen=True, slots=True)
class Parcel:
    """What one piece carries: prompt block indices, rising, and the source's blocks that hold them."""

    indices: tuple[int, ...]
    blocks: tuple[BlockId, ...]


def next_parcel(wanted: Collection[int], announced: Collection[int], table: list[BlockId], complete: int) -> Parcel:
    """The wanted blocks that are complete (index below `complete`) and not announced yet."""
    indices = tuple(index for index in sorted(wanted) if index < complete and index not in announced)
    return Parcel(indices, tuple(table[index] for index in indices))
