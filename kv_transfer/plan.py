"""What a hand-over moves, from which rank to which, and whether it may. Pure.

    source, 2 ranks     | heads 0 1 2 3 | heads 4 5 6 7 |      each arrow is a Route: a range of heads
                          |       |       |       |            of the layers that both sides hold
    reader, 4 ranks     | 0 1 | | 2 3 | | 4 5 | | 6 7 |

Blocks of different sizes are another matter, see cuts.py; reshape.py carries a plan out.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from ..core.errors import GeometryMismatch
from ..core.ids import BlockId
from ..core.tickets import KV_WIDTHS, Geometry

_UNITS = {"num_kv_heads": "KV heads", "head_size": "head_size"}


def require_bridged(source: Geometry, reader: Geometry) -> None:
    """The source's KV can be made the reader's, in all of the reader's layers. Raises GeometryMismatch that names all
    that keeps it from that."""
    if source != reader:
        _refuse((*_unbridged(source, reader), *_lacking(source, reader)))


def keeps_keys(source: Geometry, reader: Geometry) -> bool:
    """The reader may make what it got known under its own block keys, whose fingerprint names its dtype.

    Not where it stores wider numbers than it got: who finds such a block, or one computed after it, would take it to be
    exact.
    """
    return KV_WIDTHS[source.dtype] >= KV_WIDTHS[reader.dtype]


@dataclass(frozen=True, slots=True)
class Side:
    """A worker's stage, as the other sees it. Raises ValueError unless its ranks hold all KV heads between them."""

    geometry: Geometry
    rank_heads: tuple[range, ...]  # the KV heads in each rank's pool; where ranks outnumber heads, several hold one

    @classmethod
    def whole(cls, geometry: Geometry) -> "Side":
        """Of blocks that have all heads, as those of all ranks together do."""
        return cls(geometry, (range(geometry.num_kv_heads),))

    def __post_init__(self) -> None:
        total = range(self.geometry.num_kv_heads)
        for rank, held in enumerate(self.rank_heads):
            if not held or held.step != 1 or held[0] not in total or held[-1] not in total:
                raise ValueError(f"rank {rank} can't hold KV heads {held} of {len(total)}")
        missing = set(total).difference(*self.rank_heads)
        if missing:
            raise ValueError(f"no rank holds KV head {min(missing)} of {len(total)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What one rank's pool gives to another's. Layers and heads count from the first that the pool holds."""

    source_rank: int
    source_layers: range
    source_heads: range
    reader_rank: int
    reader_layers: range
    reader_heads: range


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every layer that both sides hold, for every head of every rank of the reader: each once."""

    source: Side
    reader: Side
    routes: tuple[Route, ...]  # by reader's rank, then its heads

    @property
    def converts(self) -> bool:
        return self.source.geometry.dtype != self.reader.geometry.dtype

    @property
    def keeps_keys(self) -> bool:
        return keeps_keys(self.source.geometry, self.reader.geometry)


def plan_hand_over(source: Side, reader: Side) -> Plan:
    """Which heads of which layers go from which rank to which.

    A head that several source ranks hold is read from the one that has least to give so far, so replicas share the
    work; a rank of the reader gets as few routes as there are. Where layers overlap in part (stages that are cut
    differently), the plan covers that part, and the reader's other layers come from other stages.

    Raises GeometryMismatch that names all that can't be bridged.
    """
    _refuse(_unbridged(source.geometry, reader.geometry))
    given = [0] * len(source.rank_heads)  # heads, by source rank
    routes = []
    for rank, wanted in enumerate(reader.rank_heads):
        head = wanted.start
        while head < wanted.stop:
            giver, stop = _giver(source, range(head, wanted.stop), given)
            given[giver] += stop - head
            routes.append(_route(source, giver, reader, rank, range(head, stop)))
            head = stop
    return Plan(source=source, reader=reader, routes=tuple(routes))


def _giver(source: Side, wanted: range, given: list[int]) -> tuple[int, int]:
    """(source rank, up to which head) for the beginning of `wanted`: who reaches furthest; of those, who gave least."""
    holders = [(rank, held) for rank, held in enumerate(source.rank_heads) if wanted.start in held]
    rank, held = min(holders, key=lambda one: (-min(one[1].stop, wanted.stop), given[one[0]], one[0]))
    return rank, min(held.stop, wanted.stop)


def _route(source: Side, source_rank: int, reader: Side, reader_rank: int, heads: range) -> Route:
    layers = _common_layers(source.geometry, reader.geometry)
    return Route(
        source_rank=source_rank,
        source_layers=_counted_from(source.geometry.first_layer, layers),
        source_heads=_counted_from(source.rank_heads[source_rank].start, heads),
        reader_rank=reader_rank,
        reader_layers=_counted_from(reader.geometry.first_layer, layers),
        reader_heads=_counted_from(reader.rank_heads[reader_rank].start, heads),
    )


def _counted_from(first: int, numbers: range) -> range:
    return range(numbers.start - first, numbers.stop - first)


def _common_layers(source: Geometry, reader: Geometry) -> range:
    return range(max(source.layers.start, reader.layers.start), min(source.layers.stop, reader.layers.stop))


def _unbridged(source: Geometry, reader: Geometry) -> Iterator[str]:
    if not _same_model(source, reader):
        said = [side.model or side.fingerprint for side in (source, reader)]
        yield f"model: {said[0]} here, {said[1]} at the reader"
    for name in ("num_kv_heads", "head_size"):
        here, there = getattr(source, name), getattr(reader, name)
        if here != there:
            yield f"{_UNITS[name]}: {here} here, {there} at the reader"
    if not _common_layers(source, reader):
        yield f"layers: {_named(source.layers)} here, {_named(reader.layers)} at the reader, none in common"
    unknown = {source.dtype, reader.dtype} - KV_WIDTHS.keys()
    if unknown:
        yield f"dtype: {source.dtype} here, {reader.dtype} at the reader, and {min(unknown)} is not one we know"


def _lacking(source: Geometry, reader: Geometry) -> Iterator[str]:
    common = _common_layers(source, reader)
    if common and common != reader.layers:
        yield f"layers: {_named(source.layers)} here, {_named(reader.layers)} at the reader"


def _same_model(source: Geometry, reader: Geometry) -> bool:
    """`fingerprint` holds the KV's dtype too, so it is asked only where a side does not say its model alone."""
    if source.model and reader.model:
        return source.model == reader.model
    return source.fingerprint == reader.fingerprint


def _named(layers: range) -> str:
    return f"{layers.start} to {layers.stop - 1}"


def _refuse(differences: Iterable[str]) -> None:
    named = "; ".join(differences)
    if named:
        raise GeometryMismatch(f"the two workers' KV cannot be exchanged ({named})")


@dataclass(frozen=True, slots=True)
class Parcel:
    """What one piece carries: prompt block indices, rising, and the source's blocks that hold them."""

    indices: tuple[int, ...]  # in blocks of the source's size
    blocks: tuple[BlockId, ...]


def next_parcel(wanted: Collection[int], announced: Collection[int], table: list[BlockId], complete: int) -> Parcel:
    """The wanted blocks that are complete (index below `complete`) and not announced yet; equal block sizes only."""
    indices = tuple(index for index in sorted(wanted) if index < complete and index not in announced)
    return Parcel(indices, tuple(table[index] for index in indices))
