"""What crosses a link and the ring behind it: commands to a worker, its frames, its reports, its view of itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from .ids import BlockId, Epoch, SequenceId, WorkerId
from .request import Ended, Load, Request, SequenceTokens, TimedPart
from .tickets import Geometry, Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The router's greeting, first on a link."""

    router_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOver:
    """To a prefill worker: who takes the KV of this sequence."""

    sequence_id: SequenceId
    ticket: Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Ends a sequence early; of an unknown or ended sequence it changes nothing."""

    sequence_id: SequenceId


Command: TypeAlias = Hello | Request | HandOver | Release
"""What a router tells a worker. A `Request` says: take this sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The worker's greeting, on its first frame."""

    worker_id: WorkerId
    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketGranted:
    sequence_id: SequenceId
    ticket: Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """Plain tokens of many sequences, as columns of one length: `token_ids[i]` is at `positions[i]` of the answer of
    the sequence that its link knows as `numbers[i]`. Those of one sequence stand in order."""

    numbers: Sequence[int]  # never 0
    positions: Sequence[int]
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFrame:
    """All that one step has to say on one link. A reader takes tickets first, then tokens (of both kinds, by their
    positions), then ends."""

    welcome: Welcome | None = None
    tickets: tuple[TicketGranted, ...] = ()
    tokens: tuple[SequenceTokens, ...] = ()
    ended: tuple[Ended, ...] = ()
    load: Load | None = None
    step: StepTokens | None = None


PINNED = "pinned"
"""State of blocks that no sequence holds, and that are never evicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Blocks that one sequence holds, and in which state."""

    sequence_id: SequenceId  # empty for what is held for none: "pinned"
    state: str  # e.g. "running", "lent", "reserved"
    block_ids: Sequence[BlockId]
    tokens: int = 0  # whose KV is in them


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerDump:
    """The state of every block, as one consistent picture between two steps."""

    total_blocks: int
    free_blocks: int
    cached_blocks: int  # no holder, evictable
    held_blocks: int
    lent_blocks: int = 0  # held, and announced to a peer
    holders: tuple[Holder, ...] = ()
    violations: tuple[str, ...] = ()  # invariants that do not hold
    transport_objects: int = 0  # objects of the transport that still live
    pinned_blocks: int = 0  # held by no sequence, and never evicted
    unused_slots: int = 0  # token slots of held blocks that hold no token


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How KV moves between a worker and another one."""

    peer: str  # inbox of the other one's rank
    transport: str  # what carries it now; empty: nothing can
    reason: str = ""  # why it is not the fastest one; empty: it is
    probed_gb_per_s: float = 0.0  # of the mapped pool, at the handshake; 0: not measured
    stale_reads: int = 0  # pulls that found a block given to another holder meanwhile, on the open stream


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """What a worker says of itself to an operator."""

    worker_id: WorkerId
    epoch: Epoch
    role: str  # "prefill", "decode" or "both"
    model: str
    device: str
    transport: str  # what may carry KV between workers: "auto", or the one that is pinned
    geometry: Geometry
    load: Load
    steps: int = 0
    uptime_s: float = 0.0
    transfer_gb_per_s: float = 0.0  # measured over the last pulls; 0: none yet
    ways: tuple[Way, ...] = ()  # to and from each worker that KV was exchanged with


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """Pieces that one transport has brought here."""

    transport: str
    pieces: int
    num_bytes: int
    seconds: float  # of all these pulls, added up


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a step loop tells its service for metrics and traces: the counts since the last report, the gauges now."""

    parts: tuple[TimedPart, ...] = ()
    batch_sizes: tuple[int, ...] = ()  # sequences in each step
    step_s: tuple[float, ...] = ()  # duration of each step, as many as batch_sizes
    tokens: int = 0  # sampled
    prefill_tokens: int = 0  # prompt tokens computed
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    carried: tuple[Carried, ...] = ()  # pieces pulled, by transport
    load: Load = field(default_factory=Load)
    cached_blocks: int = 0
    held_blocks: int = 0
    lent_blocks: int = 0
    preempted_swap: int = 0  # sequences whose blocks went to host memory to make room
    preempted_recompute: int = 0  # sequences whose blocks were given up, to be computed again
    swap_bytes: int = 0  # moved to and from host memory
    unused_slots: int = 0  # token slots of held blocks that hold no token
    device_busy_s: float = 0.0  # of a GPU, at steps
    device_idle_s: float = 0.0  # between a step and the next, where there was one to run

    @property
    def steps(self) -> int:
        return len(self.batch_sizes)
