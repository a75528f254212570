"""What goes on after a break: a worker is lost, a client asks again. No token is lost, and none is given twice."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.errors import (
    BatonError,
    InvalidRequest,
    Overloaded,
    RequestConflict,
    UnknownRequest,
    WorkerLost,
)
from baton.core.ids import SequenceId
from baton.core.request import Ended, EndReason, FinishReason
from baton.router import relay as relay_module
from baton.router.records import Message
from baton.router.workers import News
from baton.text.tokenizer import Tokenizer

from .fakes import Bench, FakeSeat, a_request, a_ticket, answers_with, finishes, read_all, submit, text_of, turns, until


async def test_a_repeated_request_attaches_and_leaves_out_what_was_sent(bench: Bench) -> None:
    bench.workers.on_admit = answers_with(b"hello", bench.tokenizer)
    messages = await read_all(submit(bench, a_request()))
    again = submit(bench, a_request())
    assert text_of(await read_all(again)) == "hello"
    rest = await read_all(again, after_seq=2)
    assert text_of(rest) == "llo"
    assert rest[-1].usage == messages[-1].usage
    assert len(bench.workers.prefills) == 1
    with pytest.raises(InvalidRequest):
        await read_all(again, after_seq=99)


async def test_the_same_id_for_another_request_is_a_conflict(bench: Bench) -> None:
    bench.workers.on_admit = answers_with(b"hello", bench.tokenizer)
    await read_all(submit(bench, a_request()))
    with pytest.raises(RequestConflict):
        submit(bench, a_request(temperature=0.25))


@pytest.mark.parametrize("sampling", [{"seed": None}, {"n": 2}])
def test_resuming_what_is_not_known_and_can_not_be_repeated_is_an_error(bench: Bench, sampling: dict[str, Any]) -> None:
    request = a_request(**sampling)
    request.stream.resume_after_seq = 3
    with pytest.raises(UnknownRequest):
        submit(bench, request)


@pytest.mark.parametrize("sampling", [{"seed": 7}, {"seed": None, "temperature": 0}])
async def test_a_router_that_does_not_know_a_request_repeats_it_and_leaves_out_what_came(
    bench: Bench, sampling: dict[str, Any]
) -> None:
    ids = bench.tokenizer.encode("hello")

    def on_admit(seat: FakeSeat) -> None:
        loop = asyncio.get_running_loop()
        if seat.worker_id == "prefill":
            loop.call_soon(seat.tokens, 0, ids[:1])
        else:  # all in one frame, and the client is in the midst of it
            loop.call_soon(seat.tokens, 1, [*ids[1:], 0], EndReason.STOP)

    bench.workers.on_admit = on_admit
    request = a_request(**sampling)
    request.stream.resume_after_seq = 3
    messages = await read_all(submit(bench, request), after_seq=3)
    assert text_of(messages) == "lo"
    assert messages[-1].seq == 6
    assert messages[-1].usage
    assert messages[-1].usage.completion_tokens == 6


async def test_a_failed_request_that_is_asked_for_again_runs_again(bench: Bench) -> None:
    bench.workers.refuse = Overloaded("no room")
    with pytest.raises(Overloaded):
        await read_all(submit(bench, a_request()))
    bench.workers.refuse = None
    bench.workers.on_admit = answers_with(b"hello", bench.tokenizer)
    assert text_of(await read_all(submit(bench, a_request()))) == "hello"
    names = [seat.request.sequence_id for seat in bench.workers.prefills if seat.request]
    assert names == ["r/0+1"], "what comes late of the first run is not taken for this one's"


async def test_a_client_whose_stream_broke_gets_the_rest_of_the_same_answer(bench: Bench) -> None:
    request = a_request(temperature=1.0)
    request.sampling.ClearField("seed")
    with submit(bench, request).attached():
        await turns()
        bench.workers.prefills[0].tokens(0, bench.tokenizer.encode("h"))
    await turns()
    assert not bench.records.running
    first = bench.workers.prefills[0].request
    bench.workers.on_admit = answers_with(b"hello", bench.tokenizer)
    request.stream.resume_after_seq = 1
    messages = await read_all(submit(bench, request), after_seq=1)
    assert text_of(messages) == "ello"
    assert finishes(messages) == [FinishReason.STOP]
    second = bench.workers.prefills[1].request
    assert first
    assert second
    assert first.sampling.seed == second.sampling.seed


async def test_a_request_that_was_cancelled_by_name_stays_cancelled(bench: Bench) -> None:
    record = submit(bench, a_request())
    with record.attached():
        await turns()
        bench.relay.cancel(record.request_id)  # and its reader leaves before the end
    await turns()
    assert record.course.state == "cancelled"
    assert submit(bench, a_request()) is record


async def test_a_lost_worker_is_replaced_before_anything_was_sent(bench: Bench) -> None:
    answer = answers_with(b"hello", bench.tokenizer)

    def on_admit(seat: FakeSeat) -> None:
        if len(bench.workers.needs) < 3:
            asyncio.get_running_loop().call_soon(seat.tell, News(lost=True))
        else:
            answer(seat)

    bench.workers.on_admit = on_admit
    assert text_of(await read_all(submit(bench, a_request()))) == "hello"
    assert bench.workers.needs[0].avoid == frozenset()
    assert bench.workers.needs[2].avoid == {"prefill", "decode"}
    names = [seat.request.sequence_id for seat in bench.workers.prefills if seat.request]
    assert names == ["r/0", "r/0~1", "r/0~2"], "what comes late of one try is not taken for the next one's"
    bench.workers.assert_all_released()


async def test_a_lost_worker_that_is_both_is_replaced_and_nothing_is_given_twice(bench: Bench) -> None:
    bench.workers.alone = True
    record = submit(bench, a_request(max_tokens=3))
    with record.attached() as reader:
        await turns()
        bench.workers.prefills[0].tokens(0, [5, 6])
        bench.workers.prefills[0].tell(News(lost=True))
        await until(lambda: len(bench.workers.prefills) == 2)
        bench.workers.prefills[1].tokens(0, [5, 6, 7], EndReason.LENGTH)
        messages = [message async for message in reader.messages()]
    assert [token for message in messages for output in message.outputs for token in output.token_ids] == [5, 6, 7]
    assert bench.workers.needs[1].avoid == {"prefill"}
    bench.workers.assert_all_released()


async def test_an_answer_that_had_begun_goes_on_elsewhere_without_a_gap_or_a_repetition(bench: Bench) -> None:
    answer = answers_with(b"hello", bench.tokenizer)

    def on_admit(seat: FakeSeat) -> None:
        loop = asyncio.get_running_loop()
        if len(bench.workers.needs) > 1:
            answer(seat)
        elif seat.worker_id == "prefill":
            loop.call_soon(seat.tokens, 0, bench.tokenizer.encode("h"))
        else:
            loop.call_later(0.001, seat.tell, News(lost=True))

    bench.workers.on_admit = on_admit
    messages = await read_all(submit(bench, a_request()))
    assert text_of(messages) == "hello"
    assert messages[-1].seq == 6


async def test_three_lost_workers_are_enough(bench: Bench) -> None:
    bench.workers.on_admit = lambda seat: (
        seat.fleet and asyncio.get_running_loop().call_soon(seat.tell, News(lost=True))
    )
    with pytest.raises(WorkerLost):
        await read_all(submit(bench, a_request()))
    assert len(bench.workers.needs) == 3
    bench.workers.assert_all_released()


async def test_what_no_other_worker_could_do_better_is_not_tried_again(bench: Bench) -> None:
    bench.workers.on_admit = lambda seat: asyncio.get_running_loop().call_soon(
        seat.end, EndReason.FAILED, "GeometryMismatch", "mend it"
    )
    with pytest.raises(BatonError, match="mend it"):
        await read_all(submit(bench, a_request()))
    assert len(bench.workers.needs) == 1


@pytest.mark.parametrize("decode_has_it", ["by prefill's word", "by its own tokens"])
@pytest.mark.parametrize("fails", [False, True])
async def test_losing_prefill_changes_nothing_once_decode_has_the_kv(
    bench: Bench, decode_has_it: str, fails: bool
) -> None:
    record = submit(bench, a_request(max_tokens=3))
    with record.attached() as reader:
        await turns()
        prefill, decode = bench.workers.prefills[0], bench.workers.decodes[0]
        decode.tell(News(ticket=a_ticket("t")))
        prefill.tokens(0, [70])
        if decode_has_it == "by its own tokens":
            decode.tokens(1, [71])
        else:
            prefill.fleet_tells(News(ended=Ended(sequence_id=SequenceId("r/0"), reason=EndReason.HANDED_OVER)))
        prefill.fleet_tells(News(ended=late_failure()) if fails else News(lost=True))
        await turns()
        assert len(bench.workers.needs) == 1
        decode.tokens(1, [71, 72], EndReason.LENGTH)
        messages = [message async for message in reader.messages()]
    assert [token for message in messages for output in message.outputs for token in output.token_ids] == [70, 71, 72]


def late_failure() -> Ended:
    """What prefill says when the word that decode has committed was lost and the lease ran out."""
    return Ended(
        sequence_id=SequenceId("r/0"), reason=EndReason.FAILED, error_code="LeaseExpired", error_message="late"
    )


async def test_losing_prefill_with_token_0_still_under_way_is_mended_at_once(bench: Bench) -> None:
    """Decode's tokens are there, but nothing can be given on before token 0, which only prefill sends."""
    record = submit(bench, a_request(max_tokens=3))
    with record.attached() as reader:
        await turns()
        bench.workers.decodes[0].tokens(1, [71])
        bench.workers.prefills[0].fleet_tells(News(lost=True))
        await turns()
        assert bench.workers.decodes[0].released
        bench.workers.prefills[1].tokens(0, [70])
        bench.workers.decodes[1].tokens(1, [71, 72], EndReason.LENGTH)
        messages = [message async for message in reader.messages()]
    assert [token for message in messages for output in message.outputs for token in output.token_ids] == [70, 71, 72]


async def test_losing_prefill_before_decode_has_the_kv_is_mended_at_once(bench: Bench) -> None:
    """Decode would wait for a piece that never comes, until its reservation runs out."""
    record = submit(bench, a_request(max_tokens=3))
    with record.attached() as reader:
        await turns()
        prefill = bench.workers.prefills[0]
        prefill.tokens(0, [70])
        prefill.fleet_tells(News(lost=True))
        await turns()
        assert bench.workers.decodes[0].released
        bench.workers.prefills[1].tokens(0, [70])
        bench.workers.decodes[1].tokens(1, [71, 72], EndReason.LENGTH)
        messages = [message async for message in reader.messages()]
    assert [token for message in messages for output in message.outputs for token in output.token_ids] == [70, 71, 72]


STEPS = st.one_of(
    st.tuples(st.just("prefill"), st.sampled_from(["token", "token and stop", "handed over", "failed", "lost"])),
    st.tuples(st.just("decode"), st.sampled_from(["ticket", "tokens", "tokens again", "end", "failed", "lost"])),
    st.tuples(st.just("client"), st.sampled_from(["cancel", "leave", "turn", "turn", "turn"])),
)


@given(steps=st.lists(STEPS, max_size=20))
@settings(max_examples=120, deadline=None)
def test_any_storm_ends_once_and_leaves_no_seat(steps: list[tuple[str, str]], tokenizer: Tokenizer) -> None:
    before, relay_module.BACKOFF_S = relay_module.BACKOFF_S, 0.0
    try:
        asyncio.run(storm(Bench(tokenizer), steps))
    finally:
        relay_module.BACKOFF_S = before


async def storm(bench: Bench, steps: list[tuple[str, str]]) -> None:
    """Plays the steps to the latest pair of workers, then ends whatever still runs."""
    record = submit(bench, a_request())
    sent: list[Message] = []
    ends: list[object] = []

    async def read() -> None:
        try:
            sent.extend(await read_all(record))
            ends.append("message")
        except BatonError as error:
            ends.append(error)

    reader = asyncio.create_task(read())
    await turns(8)
    for who, what in steps:
        if who == "client":
            if what == "cancel":
                bench.relay.cancel(record.request_id)
            elif what == "leave":
                reader.cancel()
            await turns(3)
        elif bench.workers.prefills:
            play((bench.workers.prefills if who == "prefill" else bench.workers.decodes)[-1], what)
    bench.relay.cancel(record.request_id)
    await turns(10)
    assert record.ended
    assert not bench.records.running
    bench.workers.assert_all_released()
    assert len(ends) == (0 if reader.cancelled() else 1)
    ids = [token for message in sent for output in message.outputs for token in output.token_ids]
    assert ids == list(range(70, 70 + len(ids))), "each token once and in order"
    if ends == ["message"]:
        assert sent[-1].usage
        assert len(finishes(sent)) == 1
        assert sent[-1].seq == len(ids)


def play(seat: FakeSeat, what: str) -> None:
    if seat.request is None:
        return
    match what:
        case "token":
            seat.tokens(0, [70])
        case "token and stop":
            seat.tokens(0, [70], EndReason.STOP)
        case "handed over":
            seat.end(EndReason.HANDED_OVER)
        case "ticket":
            seat.tell(News(ticket=a_ticket("t")))
        case "tokens":
            seat.tokens(1, [71, 72])
        case "tokens again":
            seat.tokens(2, [72, 73, 74])
        case "end":
            seat.tokens(3, [73, 74], EndReason.STOP)
        case "failed":
            seat.end(EndReason.FAILED, "TransferFailed", "a piece is gone")
        case "lost":
            seat.tell(News(lost=True))
