"""Gives a step's tokens on to the routers: plain ones as columns, which cost little each, the others one by one."""

from ..core.request import Request, SequenceTokens, TokenLogprobs
from ..engine.continuous_batch import Chosen
from ..engine.sequence import Sequence
from .outbox import Outbox
from .roster import M, Roster

_NUMBER_BITS = 32  # of a tag, the lower ones


def tag_of(link: int, request: Request) -> int:
    """Names a sequence whose tokens go as columns, by its link and its number there; 0: they go one by one."""
    plain = request.number and request.sampling.logprobs is None
    return link << _NUMBER_BITS | request.number if plain else 0


def give_tokens(outbox: Outbox, roster: Roster[M], chosen: Chosen) -> list[Sequence]:
    """Gives the sequences whose first token it is. Those of a sequence with a tag (`tag_of`) go as columns, but for the
    first, which has more to say."""
    links = chosen.tags >> _NUMBER_BITS
    plain = (chosen.tags != 0) & (chosen.positions > 0)
    for link in set(links[plain].tolist()):
        of_link = plain & (links == link)
        numbers = chosen.tags[of_link] & ((1 << _NUMBER_BITS) - 1)
        columns = (numbers, chosen.positions[of_link], chosen.token_ids[of_link])
        outbox.step_tokens(link, *(column.tolist() for column in columns))
    first: list[Sequence] = []
    for index in (~plain).nonzero()[0].tolist():
        sequence, position = chosen.sequences[index], int(chosen.positions[index])
        member = roster.get(sequence.sequence_id)
        assert member is not None, sequence.sequence_id
        token, logprobs = int(chosen.token_ids[index]), chosen.logprobs.get(index)
        outbox.tokens(member.link, _spelled_out(sequence, position, token, logprobs))
        if not position:
            first.append(sequence)
    return first


def _spelled_out(sequence: Sequence, position: int, token: int, logprobs: TokenLogprobs | None) -> SequenceTokens:
    return SequenceTokens(
        sequence_id=sequence.sequence_id,
        first_position=position,
        token_ids=(token,),
        logprobs=() if logprobs is None else (logprobs,),
        cached_tokens=0 if position else sequence.cached_tokens,
        prompt_logprobs=() if position else sequence.prompt_logprobs,
    )
