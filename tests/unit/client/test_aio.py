import asyncio
from contextlib import aclosing

import grpc
import pytest

from baton.client import AsyncInferenceClient, ChatMessage, Retry, Sampling
from baton.core import errors

from .scripted_router import Break, ScriptedRouter, message

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def client(address: str) -> AsyncInferenceClient:
    return AsyncInferenceClient(address, timeout_s=20, retry=Retry(first_s=0, most_s=0), api_key="k")


async def test_a_broken_stream_goes_on_where_it_stopped(router: ScriptedRouter, address: str) -> None:
    router.scripts = [
        [message(1, "a"), Break(UNAVAILABLE)],
        [message(1, "a"), message(2, "b")],
        [message(3, "c"), message(3, last=True)],
    ]
    async with client(address) as ask:
        assert (await ask.generate("x", sampling=Sampling(temperature=0))).text == "abc"
    assert [request.stream.resume_after_seq for request in router.asked] == [0, 1, 2]
    assert len({(request.request_id, request.sampling.seed) for request in router.asked}) == 1


async def test_it_gives_up_after_so_many_failures(router: ScriptedRouter, address: str) -> None:
    router.scripts = [[Break(UNAVAILABLE)] for _ in range(7)]
    async with client(address) as ask:
        with pytest.raises(errors.Unavailable):
            await ask.generate("x")


async def test_errors_are_typed(router: ScriptedRouter, address: str) -> None:
    router.scripts = [[Break(grpc.StatusCode.UNAVAILABLE, name="InvalidRequest")]]
    async with client(address) as ask:
        with pytest.raises(errors.InvalidRequest):
            await ask.chat([ChatMessage("user", "hi")])
        with pytest.raises(errors.UnknownRequest):
            await ask.explain("nobody")
        with pytest.raises(errors.DeadlineExceeded):
            await ask.generate("x", timeout_s=0)


async def test_closing_the_stream_ends_the_call(router: ScriptedRouter, address: str) -> None:
    router.scripts = [[message(n, "a") for n in range(1, 1000)]]
    async with client(address) as ask:
        async with aclosing(ask.stream("x")) as stream:
            await anext(stream)
        assert (await ask.models())[0].name == "m"


async def test_cancelling_the_task_is_no_error_of_the_server(router: ScriptedRouter, address: str) -> None:
    router.scripts = [[message(1, "a")] * 1000]
    async with client(address) as ask:
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in ask.stream("x"):
                begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert len(router.asked) == 1


async def test_the_small_calls(router: ScriptedRouter, address: str) -> None:
    router.unavailable = 1
    async with client(address) as ask:
        assert (await ask.models())[0].ready
        assert await ask.tokenize("abc") == [0, 1, 2]
        assert await ask.detokenize([4, 5]) == "4 5"
        assert await ask.cancel("known")
        assert (await ask.explain("known")).state == "finished"
        with pytest.raises(errors.UnknownModel):
            await ask.model("nope")
