import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.errors import InvalidRequest, Overloaded, RequestConflict, UnknownRequest, WorkerLost
from baton.core.ids import RequestId
from baton.core.request import FinishReason, TokenLogprobs
from baton.router.records import Delta, Record, Records, Usage, merge

from .fakes import read_all, turns

DIGEST = b"digest"
USAGE = Usage(prompt_tokens=1, completion_tokens=2, cached_tokens=0)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def some_records(clock: Clock, **bounds: int) -> Records:
    limits = {"max_running": 10, "max_ended": 10, "max_ended_tokens": 1000, **bounds}
    return Records(**limits, keep_s=60.0, clock=clock)


def ended(records: Records, name: str, tokens: int = 2) -> Record:
    record = records.open(RequestId(name), DIGEST)
    record.append(Delta(index=0, text="ab", token_ids=tuple(range(tokens))))
    record.finish("finished", USAGE)
    records.close(record)
    return record


def test_an_ended_request_is_known_for_a_minute(clock: Clock) -> None:
    records = some_records(clock)
    record = ended(records, "a")
    clock.now += 59
    assert records.get(RequestId("a")) is record
    clock.now += 2
    with pytest.raises(UnknownRequest):
        records.get(RequestId("a"))


def test_a_running_request_is_not_forgotten(clock: Clock) -> None:
    records = some_records(clock)
    record = records.open(RequestId("a"), DIGEST)
    clock.now += 10_000
    assert records.find(RequestId("a")) is record


def test_the_oldest_is_forgotten_when_there_are_too_many(clock: Clock) -> None:
    records = some_records(clock, max_ended=2)
    for name in "abc":
        ended(records, name)
    assert [records.find(RequestId(name)) is not None for name in "abc"] == [False, True, True]


def test_the_oldest_is_forgotten_when_their_answers_are_too_long(clock: Clock) -> None:
    records = some_records(clock, max_ended_tokens=100)
    ended(records, "a", tokens=60)
    ended(records, "b", tokens=60)
    assert [records.find(RequestId(name)) is not None for name in "ab"] == [False, True]


def test_log_probabilities_count_as_what_they_take(clock: Clock) -> None:
    records = some_records(clock, max_ended_tokens=30)
    for name in "ab":
        record = records.open(RequestId(name), DIGEST)
        entry = TokenLogprobs(-1.0, tuple((token, -1.0) for token in range(18)))
        record.append(Delta(index=0, token_ids=(1,), logprobs=(entry,)))
        record.finish("finished", USAGE)
        records.close(record)
    assert [records.find(RequestId(name)) is not None for name in "ab"] == [False, True]


def test_a_void_record_makes_room_for_the_next_run(clock: Clock) -> None:
    records = some_records(clock, max_ended_tokens=30)
    for run in range(50):
        record = records.open(RequestId("a"), DIGEST)
        assert record.run == run
        record.append(Delta(index=0, token_ids=(1, 2, 3, 4)))
        record.fail(WorkerLost("gone"))
        records.close(record)
        assert record.void
    ended(records, "b", tokens=26)
    assert records.find(RequestId("a")) is record, "4 and 26 tokens are kept: the runs before count no more"


def test_more_than_may_run_are_refused(clock: Clock) -> None:
    records = some_records(clock, max_running=1)
    ended(records, "a")
    records.open(RequestId("b"), DIGEST)
    with pytest.raises(Overloaded):
        records.open(RequestId("c"), DIGEST)


def test_an_id_belongs_to_one_body(clock: Clock) -> None:
    records = some_records(clock)
    record = ended(records, "a")
    assert records.known(RequestId("a"), DIGEST) is record
    assert records.known(RequestId("b"), DIGEST) is None
    with pytest.raises(RequestConflict):
        records.known(RequestId("a"), b"another")


async def test_a_slow_reader_gets_what_piled_up_as_one_message() -> None:
    record = Record(RequestId("a"), DIGEST)
    with record.attached() as reader:
        messages = reader.messages()
        record.append(Delta(index=0, text="a", token_ids=(1,)))
        assert (await anext(messages)).seq == 1
        for token in range(2, 100):
            record.append(Delta(index=token % 2, text="b", token_ids=(token,)))
        message = await anext(messages)
        assert message.seq == 99
        assert [(len(output.token_ids), output.text) for output in message.outputs] == [(49, "b" * 49)] * 2
        record.finish("finished", USAGE)
        assert [entry.usage async for entry in messages] == [USAGE]


async def test_every_reader_gets_everything() -> None:
    record = Record(RequestId("a"), DIGEST)
    readers = [asyncio.create_task(read_all(record)) for _ in range(3)]
    for token in range(5):
        record.append(Delta(index=0, text="x", token_ids=(token,)))
        await turns(3)
    record.finish("finished", USAGE)
    for messages in await asyncio.gather(*readers):
        assert "".join(output.text for message in messages for output in message.outputs) == "xxxxx"


async def test_what_was_there_before_an_error_is_given_first() -> None:
    record = Record(RequestId("a"), DIGEST)
    record.append(Delta(index=0, text="a", token_ids=(1,)))
    record.fail(WorkerLost("gone"))
    with record.attached() as reader:
        messages = reader.messages()
        assert (await anext(messages)).seq == 1
        with pytest.raises(WorkerLost, match="gone"):
            await anext(messages)
        with pytest.raises(WorkerLost):
            await anext(reader.messages(final_only=True))


async def test_leaving_a_running_request_abandons_it_once() -> None:
    abandoned: list[int] = []
    record = Record(RequestId("a"), DIGEST, on_abandoned=lambda: abandoned.append(1))
    with record.attached(), record.attached():
        pass
    assert abandoned == [1]
    record.finish("finished", USAGE)
    with record.attached():
        pass
    assert abandoned == [1]


def test_resuming_beyond_what_was_sent_is_refused() -> None:
    record = Record(RequestId("a"), DIGEST)
    record.append(Delta(index=0, token_ids=(1,)))
    with pytest.raises(InvalidRequest):
        record.start_after(2)


@given(sizes=st.lists(st.integers(1, 4), max_size=8), final=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_client_that_resumes_at_what_it_got_has_everything_once(
    sizes: list[int], final: bool, data: st.DataObject
) -> None:
    record = Record(RequestId("a"), DIGEST)
    for at, size in enumerate(sizes):
        start = sum(sizes[:at])
        record.append(Delta(index=0, token_ids=tuple(range(start, start + size))))
    record.append(Delta(index=0, finish=FinishReason.STOP))
    record.finish("finished", USAGE)
    at = data.draw(st.integers(0, len(sizes)))
    messages = asyncio.run(read_all(record, after_seq=sum(sizes[:at]), final_only=final))
    got = [token for message in messages for output in message.outputs for token in output.token_ids]
    assert got == list(range(sum(sizes[:at]), sum(sizes)))
    assert messages[-1].usage == USAGE
    assert messages[-1].outputs[-1].finish is FinishReason.STOP


def test_merging_keeps_each_answer_s_order() -> None:
    merged = merge(
        [
            Delta(index=1, text="a", token_ids=(1,)),
            Delta(index=0, text="b", token_ids=(2,)),
            Delta(index=1, text="c", token_ids=(3,), finish=FinishReason.LENGTH),
        ]
    )
    assert [(output.index, output.text, output.token_ids, output.finish) for output in merged] == [
        (0, "b", (2,), None),
        (1, "ac", (1, 3), FinishReason.LENGTH),
    ]
