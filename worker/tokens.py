"""Gives a step's tokens on to the routers: plain ones as columns, which cost little each, the others one by one."""

from ..core.request import Request, SequenceTokens, TokenLogprobs
from ..engine.sequence import Sequence
from ..engine.step_result import Chosen
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
    plain = (chosen.tags != 0) & (chosen.positions > 0)
    columns = [chosen.tags, chosen.positions, chosen.token_ids]
    if not plain.all():
        columns = [column[plain] for column in columns]
    links = columns[0] >> _NUMBER_BITS
    columns[0] = columns[0] & ((1 << _NUMBER_BITS) - 1)
    of_links = set(links.tolist())
    for link in of_links:
        of_link = columns if len(of_links) == 1 else [column[links == link] for column in columns]
        outbox.step_tokens(link, *(column.tolist() for column in of_link))
    first: list[Sequence] = []
    if len(links) == len(chosen):
        return first
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
