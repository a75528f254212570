"""What a rank has to say on its links: gathered over a step, sent as one frame per link.

While the ring to the service is full nothing is lost and nobody waits: what comes is merged into the frames that are
still here, and they go out when there is room.
"""

from dataclasses import dataclass, field

from ..core.frames import TicketGranted, WorkerFrame
from ..core.ids import SequenceId
from ..core.request import Ended, Load, SequenceTokens
from ..wire.codec import frame_to_bytes
from .records import Kind, Record
from .ring import Ring, RingFull

_MAX_SIZE = 4096  # in tokens: with the most logprobs about 1 MiB, far below the ring's capacity


@dataclass(slots=True)
class _Draft:
    """A frame that may still grow. One sequence has at most one life in it."""

    tickets: list[TicketGranted] = field(default_factory=list)
    tokens: dict[SequenceId, list[SequenceTokens]] = field(default_factory=dict)
    ended: dict[SequenceId, Ended] = field(default_factory=dict)
    size: int = 0  # tokens, and what else grows, roughly

    def frame(self, load: Load | None) -> WorkerFrame:
        return WorkerFrame(
            tickets=tuple(self.tickets),
            tokens=tuple(_joined(parts) for parts in self.tokens.values()),
            ended=tuple(self.ended.values()),
            load=load,
        )


@dataclass(slots=True)
class _LinkState:
    drafts: list[_Draft] = field(default_factory=list)
    told: Load | None = None


class Outbox:
    """Frames of every open link. Called by the step loop's thread alone."""

    def __init__(self, ring: Ring) -> None:
        assert ring.capacity >= 4 << 20, "a frame must fit the ring"
        self._ring = ring
        self._links: dict[int, _LinkState] = {}

    def open(self, link: int) -> None:
        self._links.setdefault(link, _LinkState())

    def close(self, link: int) -> None:
        """What is still here for the link is dropped: nobody reads it."""
        self._links.pop(link, None)

    def granted(self, link: int, granted: TicketGranted) -> None:
        draft = self._draft(link, granted.sequence_id)
        if draft is not None:
            draft.tickets.append(granted)
            draft.size += len(granted.ticket.wanted)

    def tokens(self, link: int, tokens: SequenceTokens) -> None:
        draft = self._draft(link, tokens.sequence_id)
        if draft is not None:
            draft.tokens.setdefault(tokens.sequence_id, []).append(tokens)
            draft.size += len(tokens.token_ids)

    def ended(self, link: int, ended: Ended) -> None:
        draft = self._draft(link, ended.sequence_id)
        if draft is not None:
            draft.ended[ended.sequence_id] = ended
            draft.size += len(ended.error_message)

    def flush(self, load: Load) -> bool:
        """Send what there is, and the load where it has changed. False: the ring is full, something is still here."""
        try:
            for number, link in self._links.items():
                while len(link.drafts) > 1:
                    self._put(number, link.drafts[0].frame(None))
                    del link.drafts[0]
                news = load if load != link.told else None
                if link.drafts or news is not None:
                    self._put(number, link.drafts[0].frame(news) if link.drafts else WorkerFrame(load=news))
                    link.drafts.clear()
                    link.told = load
        except RingFull:
            return False
        return True

    def _put(self, link: int, frame: WorkerFrame) -> None:
        self._ring.put(*Record(Kind.FRAME, link, frame_to_bytes(frame)).parts())

    def _draft(self, link: int, sequence_id: SequenceId) -> _Draft | None:
        state = self._links.get(link)
        if state is None:
            return None
        last = state.drafts[-1] if state.drafts else None
        if last is None or sequence_id in last.ended or last.size >= _MAX_SIZE:
            last = _Draft()
            state.drafts.append(last)
        return last


def _joined(parts: list[SequenceTokens]) -> SequenceTokens:
    """Tokens of several steps in one; positions follow each other."""
    if len(parts) == 1:
        return parts[0]
    return SequenceTokens(
        sequence_id=parts[0].sequence_id,
        first_position=parts[0].first_position,
        token_ids=tuple(token for part in parts for token in part.token_ids),
        logprobs=tuple(entry for part in parts for entry in part.logprobs),
        cached_tokens=max(part.cached_tokens for part in parts),
    )
