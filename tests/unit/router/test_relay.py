"""A request's life: however it goes, it ends once and leaves no seat taken."""

import asyncio
import re

import pytest

from baton.core.errors import (
    ContextExceeded,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from baton.core.ids import SequenceId
from baton.core.request import Ended, EndReason, FinishReason
from baton.router.tenants import tenant_of
from baton.router.validation import ModelLimits
from baton.router.workers import News
from baton.text.tokenizer import Tokenizer
from baton.v1 import inference_pb2 as pb

from .fakes import Bench, FakeSeat, a_request, a_ticket, answers_with, finishes, read_all, submit, text_of, turns


async def test_an_answer_is_streamed_from_both_workers(bench: Bench) -> None:
    bench.workers.on_admit = answers_with(b"hello", bench.tokenizer)
    record = submit(bench, a_request())
    messages = await read_all(record)
    assert text_of(messages) == "hello"
    assert finishes(messages) == [FinishReason.STOP]
    usages = [message.usage for message in messages if message.usage]
    assert usages == [messages[-1].usage]
    assert (usages[0].prompt_tokens, usages[0].completion_tokens, usages[0].cached_tokens) == (3, 6, 3)
    assert bench.workers.prefills[0].ticket == a_ticket("r/0")
    assert record.course.state == "finished"
    bench.workers.assert_all_released()


async def test_both_workers_get_the_same_sequence_with_the_trace_and_what_is_left_of_the_deadline(bench: Bench) -> None:
    bench.workers.on_admit = answers_with(b"hello", bench.tokenizer)
    record = submit(bench, a_request(temperature=0.5), timeout_s=5.0)
    await read_all(record)
    request = bench.workers.prefills[0].request
    assert request is not None
    assert request == bench.workers.decodes[0].request
    assert (request.sequence_id, request.prompt) == ("r/0", (5, 6, 7))
    assert request.sampling.stop_token_ids == {0}
    assert record.course.trace_id in request.traceparent
    assert request.timeout_s is not None
    assert 0 < request.timeout_s <= 5.0


async def test_one_worker_that_is_both_gives_the_whole_answer(bench: Bench) -> None:
    bench.workers.alone = True
    record = submit(bench, a_request(max_tokens=4))
    with record.attached() as reader:
        await turns()
        (seat,) = bench.workers.prefills
        seat.tokens(0, [5], cached=2)
        seat.tell(News(plain=[(1, 6), (2, 7)]))
        await turns()
        assert not record.ended
        seat.tell(News(plain=[(3, 8)], ended=Ended(sequence_id=SequenceId("r/0"), reason=EndReason.LENGTH)))
        messages = [message async for message in reader.messages()]
    assert [token for message in messages for output in message.outputs for token in output.token_ids] == [5, 6, 7, 8]
    assert finishes(messages) == [FinishReason.LENGTH]
    assert (record.course.prefill_worker, record.course.decode_worker) == ("prefill", "")
    assert record.course.cached_tokens == 2
    bench.workers.assert_all_released()


async def test_log_probabilities_of_the_prompt_are_on_each_answer_s_first_message(bench: Bench) -> None:
    bench.workers.on_admit = answers_with(b"hey", bench.tokenizer)
    record = submit(bench, a_request(n=2, prompt_logprobs=1, max_tokens=4))
    messages = await read_all(record)
    for index in range(2):
        outputs = [output for message in messages for output in message.outputs if output.index == index]
        assert [(entry.token_id, entry.logprob) for entry in outputs[0].prompt_logprobs] == [
            (5, None),
            (6, -1),
            (7, -2),
        ]
        assert not any(output.prompt_logprobs for output in outputs[1:])
    assert not any(output.prompt_logprobs for message in await read_all(record, 8) for output in message.outputs)


async def test_more_log_probabilities_of_a_prompt_than_a_message_holds_are_refused(bench: Bench) -> None:
    bench.relay.limits = lambda: ModelLimits(name="m", max_model_len=10_000, vocab_size=257)
    request = a_request(n=2, prompt_logprobs=15, max_tokens=4)
    request.token_ids.ids[:] = [5] * 4097
    with pytest.raises(InvalidRequest, match="131072"):
        await read_all(submit(bench, request))


async def test_priority_and_tenant_reach_the_workers(bench: Bench) -> None:
    request = a_request()
    request.priority = -7
    record = bench.inference.submit(request, None, "", "somebody").record
    with record.attached():
        await turns()
        for seat in (*bench.workers.prefills, *bench.workers.decodes):
            assert seat.request
            assert (seat.request.priority, seat.request.tenant, seat.request.salt) == (-7, "somebody", "")


def test_a_tenant_is_a_digest_of_its_key() -> None:
    assert tenant_of("Bearer key") == tenant_of("bearer key")
    assert tenant_of("Bearer key") != tenant_of("Bearer other")
    assert re.fullmatch("[0-9a-f]{16}", tenant_of("Bearer key"))
    assert tenant_of("") == tenant_of("Bearer ") == ""


async def test_a_single_token_is_prefill_s_alone(bench: Bench) -> None:
    bench.workers.on_admit = answers_with(b"hello", bench.tokenizer)
    messages = await read_all(submit(bench, a_request(max_tokens=1)))
    assert text_of(messages) == "h"
    assert finishes(messages) == [FinishReason.LENGTH]
    assert not bench.workers.decodes


async def test_an_answer_that_ends_with_its_first_token_releases_the_decode_worker(bench: Bench) -> None:
    bench.workers.on_admit = answers_with(b"", bench.tokenizer)
    messages = await read_all(submit(bench, a_request()))
    assert finishes(messages) == [FinishReason.STOP]
    bench.workers.assert_all_released()


async def test_n_answers_are_n_sequences(bench: Bench) -> None:
    bench.workers.on_admit = answers_with(b"hey", bench.tokenizer)
    messages = await read_all(submit(bench, a_request(n=3)))
    assert [text_of(messages, index) for index in range(3)] == ["hey"] * 3
    names = [seat.request.sequence_id for seat in bench.workers.prefills if seat.request]
    assert sorted(names) == ["r/0", "r/1", "r/2"]
    assert messages[-1].usage
    assert messages[-1].usage.completion_tokens == 12
    assert messages[-1].seq == 12


async def test_one_failed_answer_of_several_ends_all(bench: Bench) -> None:
    def on_admit(seat: FakeSeat) -> None:
        assert seat.request is not None
        if seat.request.sampling.branch == 1 and seat.worker_id == "prefill":
            asyncio.get_running_loop().call_soon(seat.end, EndReason.FAILED, "InvalidRequest", "no")

    bench.workers.on_admit = on_admit
    with pytest.raises(InvalidRequest, match="no"):
        await read_all(submit(bench, a_request(n=3)))
    bench.workers.assert_all_released()


async def test_final_only_is_one_message(bench: Bench) -> None:
    bench.workers.on_admit = answers_with(b"hello", bench.tokenizer)
    messages = await read_all(submit(bench, a_request()), final_only=True)
    assert len(messages) == 1
    assert text_of(messages) == "hello"


async def test_text_is_tokenised(bench: Bench) -> None:
    bench.workers.on_admit = answers_with(b"x", bench.tokenizer)
    request = pb.GenerateRequest(text="abc")
    await read_all(submit(bench, request))
    assert bench.workers.needs[0].prompt_tokens == 3
    assert bench.workers.needs[0].max_tokens == 61, "what the context leaves"


async def test_a_chat_is_rendered_by_the_template(bench: Bench) -> None:
    bench.workers.on_admit = answers_with(b"x", bench.tokenizer)
    request = pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]))
    await read_all(submit(bench, request))
    sent = bench.workers.prefills[0].request
    assert sent is not None
    assert bench.tokenizer.decode(sent.prompt) == "<user>hi"


@pytest.mark.parametrize("text", ["x" * 64, "x" * 100_000])
async def test_a_prompt_beyond_the_context_is_refused(bench: Bench, text: str) -> None:
    with pytest.raises(ContextExceeded):
        await read_all(submit(bench, pb.GenerateRequest(text=text)))
    assert not bench.workers.needs


async def test_a_stop_string_releases_both_workers_at_once(bench: Bench) -> None:
    record = submit(bench, a_request(stop=["lo"]))
    with record.attached() as reader:
        await turns()
        prefill, decode = bench.workers.prefills[0], bench.workers.decodes[0]
        ids = bench.tokenizer.encode("hello")
        prefill.tokens(0, ids[:1])
        decode.tokens(1, ids[1:])
        await turns()
        assert prefill.released
        assert decode.released
        messages = [message async for message in reader.messages()]
    assert text_of(messages) == "hel"
    assert finishes(messages) == [FinishReason.STOP]


async def test_cancel_ends_with_a_message_of_its_own_and_the_usage(bench: Bench) -> None:
    record = submit(bench, a_request())
    with record.attached() as reader:
        await turns()
        bench.workers.prefills[0].tokens(0, [70])
        assert bench.relay.cancel(record.request_id)
        assert bench.relay.cancel(record.request_id)
        messages = [message async for message in reader.messages()]
    assert finishes(messages) == [FinishReason.CANCELLED]
    assert messages[-1].usage
    assert messages[-1].usage.completion_tokens == 1
    assert record.course.state == "cancelled"
    assert bench.relay.cancel(record.request_id), "it is still known"
    bench.workers.assert_all_released()


def test_cancelling_what_is_not_known_says_so(bench: Bench) -> None:
    assert not bench.inference.cancel("nobody")


async def test_the_last_reader_that_leaves_cancels(bench: Bench) -> None:
    record = submit(bench, a_request())
    with record.attached():
        with submit(bench, a_request()).attached():
            await turns()
        await turns()
        assert not record.ended, "one reader is still there"
    await turns()
    assert record.course.state == "cancelled"
    bench.workers.assert_all_released()


async def test_a_passed_deadline_is_told_and_releases(bench: Bench) -> None:
    record = submit(bench, a_request(), timeout_s=0.0)
    with pytest.raises(DeadlineExceeded):
        await read_all(record)
    bench.workers.assert_all_released()


async def test_no_place_is_the_client_s_to_know(bench: Bench) -> None:
    bench.workers.refuse = Unavailable("nobody there")
    with pytest.raises(Unavailable, match="nobody there"):
        await read_all(submit(bench, a_request()))


async def test_too_many_requests_are_refused(bench: Bench, tokenizer: Tokenizer) -> None:
    small = Bench(tokenizer, max_running=1)
    request = a_request()
    with submit(small, request).attached():
        request.request_id = "other"
        with pytest.raises(Overloaded):
            submit(small, request)


async def test_a_draining_router_finishes_what_runs_and_takes_nothing_new(bench: Bench) -> None:
    bench.workers.on_admit = answers_with(b"hello", bench.tokenizer)
    record = submit(bench, a_request())
    with record.attached() as reader:
        await bench.relay.drain(10.0)
        assert text_of([message async for message in reader.messages()]) == "hello"
    with pytest.raises(Unavailable):
        submit(bench, pb.GenerateRequest(text="a"))


async def test_a_drain_ends_what_does_not_end(bench: Bench) -> None:
    record = submit(bench, a_request())
    with record.attached() as reader:
        await turns()
        await bench.relay.drain(0.0)
        with pytest.raises(Unavailable):
            _ = [message async for message in reader.messages()]
    bench.workers.assert_all_released()


async def test_a_mistake_of_ours_fails_the_request_and_releases(bench: Bench) -> None:
    bench.workers.on_admit = lambda seat: asyncio.get_running_loop().call_soon(seat.tell, News(tokens=(None,)))  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        await read_all(submit(bench, a_request()))
    bench.workers.assert_all_released()


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("delay", [0, 3])
async def test_a_cancel_at_any_await_ends_once_and_leaves_no_seat(bench: Bench, branches: int, delay: int) -> None:
    for moment in range(25):
        one = Bench(bench.tokenizer)
        one.workers.on_admit = answers_with(b"hello", bench.tokenizer)
        one.workers.delay = delay
        request = a_request(n=branches)
        request.ClearField("token_ids")
        request.text = "abc"
        record = submit(one, request)
        with record.attached() as reader:
            await turns(moment)
            one.relay.cancel(record.request_id)
            messages = [message async for message in reader.messages()]
        assert [message.usage is not None for message in messages] == [False] * (len(messages) - 1) + [True]
        assert len(finishes(messages)) == branches
        one.workers.assert_all_released()
        assert not one.records.running
