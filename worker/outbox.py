"""What a rank has to say on its links: gathered over a step, sent as one frame per link.

While the ring to the service is full nothing is lost and nobody waits: what comes is merged into the frames that are
still here, and they go out when there is room.

Plain tokens go by number, as whole columns: a step of a thousand sequences costs three list appends and no object per
token. All else goes by name. A life of a sequence begins by name, with its ticket or its token 0, so that a name which
lives again gets a new draft before its numbers come.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..core.frames import StepTokens, TicketGranted, WorkerFrame
from ..core.ids import SequenceId
from ..core.request import Ended, Load, SequenceTokens
from ..wire.codec import frame_to_bytes
from .records import Kind, Record
from .ring import Ring, RingFull

_MAX_SIZE = 4096  # in tokens: with the most logprobs about 1 MiB; one prompt's may come on top, MAX_PROMPT_LOGPROBS


@dataclass(slots=True)
class _Draft:
    """A frame that may still grow. One sequence has at most one life in it."""

    tickets: list[TicketGranted] = field(default_factory=list)
    tokens: dict[SequenceId, list[SequenceTokens]] = field(default_factory=dict)
    ended: dict[SequenceId, Ended] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)  # the columns of StepTokens, like the next two
    positions: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    size: int = 0  # tokens, and what else grows, roughly

    def frame(self, load: Load | None) -> WorkerFrame:
        step = StepTokens(numbers=self.numbers, positions=self.positions, token_ids=self.token_ids)
        return WorkerFrame(
            tickets=tuple(self.tickets),
            tokens=tuple(joined for parts in self.tokens.values() for joined in _joined(parts)),
            ended=tuple(self.ended.values()),
            load=load,
            step=step if self.numbers else None,
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
        draft = self._draft_for(link, granted.sequence_id)
        if draft is not None:
            draft.tickets.append(granted)
            draft.size += len(granted.ticket.wanted)

    def tokens(self, link: int, tokens: SequenceTokens) -> None:
        """Tokens of one sequence, with all that may come beside them; token 0 that has anything beside it too."""
        draft = self._draft_for(link, tokens.sequence_id)
        if draft is not None:
            draft.tokens.setdefault(tokens.sequence_id, []).append(tokens)
            draft.size += len(tokens.token_ids) + len(tokens.prompt_logprobs)

    def step_tokens(
        self, link: int, numbers: Sequence[int], positions: Sequence[int], token_ids: Sequence[int]
    ) -> None:
        """Plain tokens, as columns of one length: see core/frames.py's StepTokens. They are copied. Of sequences that
        have a number and have not ended."""
        assert len(numbers) == len(positions) == len(token_ids), (len(numbers), len(positions), len(token_ids))
        at = 0
        while at < len(numbers) and (draft := self._draft(link)) is not None:
            end = at + _MAX_SIZE - draft.size  # a draft with room is not full
            draft.numbers += numbers[at:end]
            draft.positions += positions[at:end]
            draft.token_ids += token_ids[at:end]
            draft.size += len(numbers[at:end])
            at = end

    def ended(self, link: int, ended: Ended) -> None:
        draft = self._draft_for(link, ended.sequence_id)
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

    def _draft_for(self, link: int, sequence_id: SequenceId) -> _Draft | None:
        """The draft for what goes by name; None: the link is closed."""
        draft = self._draft(link)
        if draft is not None and sequence_id in draft.ended:
            draft = _Draft()
            self._links[link].drafts.append(draft)
        return draft

    def _draft(self, link: int) -> _Draft | None:
        """One that is not full; None: the link is closed."""
        state = self._links.get(link)
        if state is None:
            return None
        if not state.drafts or state.drafts[-1].size >= _MAX_SIZE:
            state.drafts.append(_Draft())
        return state.drafts[-1]


def _joined(parts: list[SequenceTokens]) -> list[SequenceTokens]:
    """Tokens of several steps in one, as far as positions follow each other: tokens by number may lie between, and all
    of one have log probabilities or none."""
    if len(parts) == 1:
        return parts
    runs = [[parts[0]]]
    for part in parts[1:]:
        last = runs[-1][-1]
        follows = part.first_position == last.first_position + len(last.token_ids)
        if follows and bool(part.logprobs) == bool(last.logprobs):
            runs[-1].append(part)
        else:
            runs.append([part])
    return [
        SequenceTokens(
            sequence_id=run[0].sequence_id,
            first_position=run[0].first_position,
            token_ids=tuple(token for part in run for token in part.token_ids),
            logprobs=tuple(entry for part in run for entry in part.logprobs),
            cached_tokens=run[0].cached_tokens,
            prompt_logprobs=run[0].prompt_logprobs,
        )
        for run in runs
    ]
