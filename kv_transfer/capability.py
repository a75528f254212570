"""What two workers must know of each other before KV moves between them, and whether the one can map the other's pool.

Each side gives a record of itself, once for each pair of their lives; the reader's comes with its answer. Both travel
as JSON.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.errors import GeometryMismatch
from ..core.generations import Generations
from ..core.ids import Epoch, WorkerId
from ..core.tickets import Geometry
from .encoding import Damaged
from .inbox import Inbox
from .plan import require_bridged
from .pool import Blocks

AUTO, MAPPED, RAY_STORE = "auto", "mapped", "ray_store"
TRANSPORTS = (AUTO, MAPPED, RAY_STORE)


@dataclass(frozen=True, slots=True)
class RankPool:
    """One rank's KV pool, [N, L, 2, G_r, P, D] of the geometry's dtype, in a segment of its host."""

    address: str  # of core/segment.py
    first_head: int
    num_heads: int

    @property
    def heads(self) -> range:
        return range(self.first_head, self.first_head + self.num_heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Processes that can open each other's memory have an equal one."""

    boot_id: str
    pid_namespace: str  # the addresses of segments name processes
    user: int

    @classmethod
    def here(cls) -> "Host":
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(boot_id=boot_id, pid_namespace=os.readlink("/proc/self/ns/pid"), user=os.geteuid())


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """One life of a worker."""

    worker_id: WorkerId
    epoch: Epoch
    inbox: str
    host: Host
    transport: str  # one of TRANSPORTS: "auto", or what a person has pinned
    geometry: Geometry
    num_blocks: int
    pools: tuple[RankPool, ...]  # of all its ranks; empty: they can't be mapped, ...
    unmapped: str  # ... and why
    generations: str  # address of its generation words
    socket: str  # path where its streams are taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Of a reader, to a source's record."""

    record: Capability
    refusal: str = ""  # why it does not map the source's pool; empty: it does
    lasting: bool = False  # the refusal stands for as long as both live
    token: str = ""  # for the stream's Hello, in hexadecimal
    gb_per_s: float = 0.0  # of a copy out of the source's pool


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What a rank brings to a transport."""

    worker_id: WorkerId
    epoch: Epoch
    address: str  # of its inbox, for peers
    inbox: Inbox
    geometry: Geometry
    pool: Blocks
    num_blocks: int
    pools: tuple[RankPool, ...] = ()  # as in Capability
    unmapped: str = ""
    generations: Generations | None = None  # where pools can be mapped
    socket: Path
    transport: str = AUTO
    checked: bool = True  # what is offered gets checksums

    @property
    def capability(self) -> Capability:
        return Capability(
            worker_id=self.worker_id,
            epoch=self.epoch,
            inbox=self.address,
            host=Host.here(),
            transport=self.transport,
            geometry=self.geometry,
            num_blocks=self.num_blocks,
            pools=self.pools,
            unmapped=self.unmapped,
            generations="" if self.generations is None else self.generations.address,
            socket=str(self.socket),
        )


def why_not_mapped(source: Capability, reader: Capability) -> str:
    """What keeps the reader from mapping the source's pool, in words; empty: nothing. Pure."""
    for side, name in ((source, "source"), (reader, "reader")):
        if side.transport == RAY_STORE:
            return f"the {name} {side.worker_id} is pinned to {RAY_STORE}"
        if side.unmapped:
            return f"{side.unmapped} of the {name} {side.worker_id}"
    if source.host.boot_id != reader.host.boot_id:
        return f"{source.worker_id} and {reader.worker_id} are on different hosts"
    if source.host != reader.host:
        return f"{source.worker_id} and {reader.worker_id} are different users', or in different containers"
    try:
        require_bridged(source.geometry, reader.geometry)
    except GeometryMismatch as error:
        return str(error)
    return ""


def to_bytes(record: Capability | Answer) -> bytes:
    return json.dumps(asdict(record)).encode()


def capability_from_bytes(data: bytes) -> Capability:
    """Raises Damaged."""
    try:
        return _capability(json.loads(data))
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(f"a capability record can't be read: {error}") from None


def answer_from_bytes(data: bytes) -> Answer:
    """Raises Damaged."""
    try:
        fields = json.loads(data)
        return Answer(**{**fields, "record": _capability(fields["record"])})
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(f"an answer to a handshake can't be read: {error}") from None


def _capability(fields: dict[str, Any]) -> Capability:
    made = {
        "host": Host(**fields["host"]),
        "geometry": Geometry(**fields["geometry"]),
        "pools": tuple(RankPool(**pool) for pool in fields["pools"]),
    }
    return Capability(**{**fields, **made})
