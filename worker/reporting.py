"""What the step loop counts for metrics and traces, and how it gets to the service: at most one report per step."""

from collections import deque

from ..core.frames import Carried, Report
from ..core.request import Load, TimedPart
from ..engine.preemption import PreemptionCounts
from ..engine.step_result import StepResult
from ..kv_transfer.transport import Moved
from ..observe import names
from ..wire.worker_codec import report_to_bytes
from .records import Kind, Record
from .ring import Ring, RingFull
from .roster import Member

_MAX_PARTS = 4096  # the oldest are dropped: a trace may lack a part, a worker may not run out of memory
_MAX_STEPS = 4096
_QUIET_S = 0.25  # counts alone wait this long
_RATE_PIECES = 64

Attributes = tuple[tuple[str, str | int | float | bool], ...]


class Reporter:
    """Counts since the last report. Called by the step loop's thread alone."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._parts: deque[TimedPart] = deque(maxlen=_MAX_PARTS)
        self._steps: deque[tuple[int, float]] = deque(maxlen=_MAX_STEPS)
        self._tokens = self._prefill_tokens = self._cached_tokens = 0
        self._busy_s = self._idle_s = 0.0
        self._preempted = self._told_preempted = PreemptionCounts(0, 0, 0)
        self._moved: list[Moved] = []
        self._recent: deque[Moved] = deque(maxlen=_RATE_PIECES)
        self._gauges = self._told = (Load(), 0, 0)
        self._due = 0.0
        self.steps = 0

    def part(self, member: Member, name: str, start_ns: int, end_ns: int, attributes: Attributes = ()) -> None:
        """One part of a sequence's life; nothing for a sequence without a trace."""
        if member.request.traceparent:
            self._parts.append(
                TimedPart(
                    sequence_id=member.sequence_id,
                    name=name,
                    traceparent=member.request.traceparent,
                    start_ns=start_ns,
                    end_ns=end_ns,
                    attributes=attributes,
                )
            )

    def step(self, result: StepResult, seconds: float) -> None:
        self._tokens += len(result.tokens)
        self._prefill_tokens += result.stats.prefill_tokens
        self._busy_s += sum(one.busy_s for one in result.device)
        self._idle_s += sum(one.idle_s for one in result.device)
        if result.stats.sequences:
            self._steps.append((result.stats.sequences, seconds))
            self.steps += 1

    def preempted(self, counts: PreemptionCounts) -> None:
        """Since the start."""
        self._preempted = counts

    def cached(self, tokens: int) -> None:
        """Prompt tokens found in the prefix cache."""
        self._cached_tokens += tokens

    def transferred(self, moved: list[Moved]) -> None:
        self._moved += [one for one in moved if one.num_blocks]
        self._recent.extend(one for one in moved if one.num_blocks)

    def gb_per_s(self) -> float:
        """Over the last pieces; 0: none yet."""
        nanoseconds = sum(one.end_ns - one.start_ns for one in self._recent)
        return sum(one.num_bytes for one in self._recent) / nanoseconds if nanoseconds else 0.0

    def gauges(self, load: Load, cached_blocks: int, held_blocks: int) -> None:
        """How things stand. A change is told as counts are, so that the metrics are right also when nothing runs."""
        self._gauges = (load, cached_blocks, held_blocks)

    def due(self, now: float) -> bool:
        """Parts go at once, counts alone now and then."""
        return bool(self._parts) or (self.pending() and now >= self._due)

    def flush(self, now: float, lent_blocks: int, unused_slots: int) -> None:
        """Send a report. While the ring is full it waits for a later step."""
        load, cached_blocks, held_blocks = self._gauges
        counts, told = self._preempted, self._told_preempted
        report = Report(
            parts=tuple(self._parts),
            batch_sizes=tuple(size for size, _ in self._steps),
            step_s=tuple(seconds for _, seconds in self._steps),
            tokens=self._tokens,
            prefill_tokens=self._prefill_tokens,
            cached_tokens=self._cached_tokens,
            carried=carried(self._moved),
            load=load,
            cached_blocks=cached_blocks,
            held_blocks=held_blocks,
            lent_blocks=lent_blocks,
            preempted_swap=counts.swapped - told.swapped,
            preempted_recompute=counts.recomputed - told.recomputed,
            swap_bytes=counts.swap_bytes - told.swap_bytes,
            unused_slots=unused_slots,
            device_busy_s=self._busy_s,
            device_idle_s=self._idle_s,
        )
        try:
            self._ring.put(*Record(Kind.REPORT, 0, report_to_bytes(report)).parts())
        except RingFull:
            return
        self._due = now + _QUIET_S
        self._told = self._gauges
        self._told_preempted = counts
        self._parts.clear()
        self._steps.clear()
        self._moved.clear()
        self._tokens = self._prefill_tokens = self._cached_tokens = 0
        self._busy_s = self._idle_s = 0.0

    def pending(self) -> bool:
        told = self._gauges == self._told and self._preempted == self._told_preempted
        return bool(self._parts or self._steps or self._moved) or not told


def carried(moved: list[Moved]) -> tuple[Carried, ...]:
    """By transport."""
    kinds = sorted({one.transport for one in moved})
    parts = {kind: [one for one in moved if one.transport == kind] for kind in kinds}
    return tuple(
        Carried(
            transport=kind,
            pieces=len(part),
            num_bytes=sum(one.num_bytes for one in part),
            seconds=sum(one.end_ns - one.start_ns for one in part) / 1e9,
        )
        for kind, part in parts.items()
    )


def transfer_attributes(moved: list[Moved], ticket_id: str) -> Attributes:
    """What a span tells of the pieces it covers."""
    num_bytes = sum(one.num_bytes for one in moved)
    nanoseconds = sum(one.end_ns - one.start_ns for one in moved)
    return (
        (names.TICKET_ID, ticket_id),
        (names.TRANSFER_BYTES, num_bytes),
        (names.TRANSFER_BLOCKS, sum(one.num_blocks for one in moved)),
        (names.TRANSFER_PIECES, len(moved)),
        (names.TRANSFER_GB_PER_S, num_bytes / nanoseconds if nanoseconds else 0.0),
        (names.TRANSFER_TRANSPORT, "+".join(sorted({one.transport for one in moved}))),
    )
