import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from baton.core.errors import Overloaded
from baton.core.frames import Release
from baton.core.ids import SequenceId
from baton.core.request import Request, Sampling
from baton.v1 import link_pb2
from baton.wire.codec import commands_from_bytes
from baton.worker.rank_client import RankClient
from baton.worker.records import Kind, Record
from baton.worker.ring import RingPair

RELEASE = Release(sequence_id=SequenceId("a/0"))
ADMIT = Request(sequence_id=SequenceId("b/0"), prompt=(1, 2), sampling=Sampling(max_tokens=3))


@pytest.fixture
async def ends(tmp_path: Path) -> AsyncIterator[tuple[RankClient, RingPair]]:
    with RingPair.for_rank(tmp_path, "w", 4096) as rank, RingPair.for_service(tmp_path, "w") as service:
        client = RankClient(service, lambda _: None, lambda _: None)
        yield client, rank
        client.close()


async def test_a_full_ring_refuses_new_sequences_and_delays_all_else(ends: tuple[RankClient, RingPair]) -> None:
    client, rank = ends
    await client.put(Record(Kind.FRAME, 99, bytes(4080)))
    async with client.link() as link:
        sending = asyncio.create_task(link.send([ADMIT, RELEASE]))
        frame = await anext(link.frames())
        assert [(ended.sequence_id, ended.failure.code) for ended in frame.ended] == [("b/0", "Overloaded")]
        assert not sending.done()
        rank.incoming.take()
        await sending
        (record,) = [Record.parse(data) for data in rank.incoming.take()]
        assert (record.kind, record.number) == (Kind.FRAME, link.number)
        assert commands_from_bytes(record.body) == [RELEASE]


async def test_the_rank_learns_of_a_closed_link_even_when_the_ring_was_full(
    ends: tuple[RankClient, RingPair],
) -> None:
    client, rank = ends
    async with client.link() as link:
        await client.put(Record(Kind.FRAME, 99, bytes(4080)))
    rank.incoming.take()
    await client.put(Record(Kind.STOP))
    records = [Record.parse(data) for data in rank.incoming.take()]
    assert [(record.kind, record.number) for record in records] == [(Kind.LINK_CLOSED, link.number), (Kind.STOP, 0)]


async def test_a_router_that_never_reads_is_cut_off(ends: tuple[RankClient, RingPair]) -> None:
    client, _ = ends
    async with client.link() as link:
        frame = link_pb2.ConnectResponse(ended=[link_pb2.Ended(sequence_id="a/0")])
        for _ in range(9000):
            link.push(frame)
        with pytest.raises(Overloaded):
            await anext(link.frames())


async def test_a_question_that_nobody_answers_times_out(ends: tuple[RankClient, RingPair]) -> None:
    client, _ = ends
    with pytest.raises(TimeoutError):
        await client.ask(Kind.STATUS, b"", 0.01)
