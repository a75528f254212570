"""The OpenAI door, called as its clients call it."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from baton.core.request import EndReason
from baton.router.http import HttpDoor, build_app
from baton.router.tenants import tenant_of
from baton.router.workers import News
from baton.text.tokenizer import Tokenizer

from .fakes import Bench, answers_with, turns, until

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def a_client(bench: Bench, **options: Any) -> httpx.AsyncClient:
    app = build_app(bench.inference, **{"max_body_bytes": 10_000, **options})
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router")


@pytest.fixture
def client(bench: Bench) -> httpx.AsyncClient:
    bench.workers.on_admit = answers_with(b"hello", bench.tokenizer)
    return a_client(bench)


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


async def test_models_are_listed(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [(model["id"], model["object"], model["max_model_len"]) for model in listed["data"]] == [("m", "model", 64)]
    assert (await client.get("/v1/models/m")).json()["id"] == "m"
    missing = await client.get("/v1/models/x/y")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_health_is_open_and_says_whether_requests_can_run(bench: Bench) -> None:
    client = a_client(bench, api_keys=["k"])
    assert (await client.get("/health")).status_code == 200
    bench.inference._ready = lambda: False
    assert (await client.get("/health")).status_code == 503


async def test_a_chat_completion(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json={**HI, "model": "m", "user": "u", "max_completion_tokens": 8, "who": 1})
    body = response.json()
    assert response.status_code == 200, body
    assert body["object"] == "chat.completion"
    assert body["model"] == "m"
    assert body["id"] == "chatcmpl-" + response.headers["x-request-id"]
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 8,
        "completion_tokens": 6,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_a_text_completion_of_two_answers(client: httpx.AsyncClient) -> None:
    body = (await client.post(TEXT, json={"prompt": "abc", "n": 2, "max_tokens": 2})).json()
    assert body["object"] == "text_completion"
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "he"), (1, "he")]
    assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}


@pytest.mark.parametrize("prompt", ["abc", ["abc"], [5, 6, 7], [[5, 6, 7]]])
async def test_every_form_of_one_prompt_is_taken(client: httpx.AsyncClient, prompt: object) -> None:
    body = (await client.post(TEXT, json={"prompt": prompt})).json()
    assert body["usage"]["prompt_tokens"] == 3


async def test_a_streamed_chat(client: httpx.AsyncClient) -> None:
    asked = {**HI, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(await client.post(CHAT, json=asked))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas) == "hello"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 6


async def test_a_stream_without_usage_has_none(client: httpx.AsyncClient) -> None:
    chunks = events(await client.post(TEXT, json={"prompt": "a", "stream": True}))
    assert not any("usage" in chunk for chunk in chunks)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello"


async def test_stop_is_a_text_or_a_list(client: httpx.AsyncClient) -> None:
    for stop in ("lo", ["x", "lo"]):
        body = (await client.post(CHAT, json={**HI, "stop": stop})).json()
        assert body["choices"][0]["message"]["content"] == "hel"
        assert body["choices"][0]["finish_reason"] == "stop"


async def test_logprobs_of_a_chat(client: httpx.AsyncClient) -> None:
    body = (await client.post(CHAT, json={**HI, "logprobs": True, "top_logprobs": 2, "max_tokens": 2})).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert [(entry["token"], entry["logprob"], entry["bytes"]) for entry in content] == [
        ("h", -0.5, [104]),
        ("e", -0.5, [101]),
    ]
    assert len(content[0]["top_logprobs"]) == 2


async def test_logprobs_give_the_bytes_of_a_part_of_a_character(bench: Bench) -> None:
    bench.workers.on_admit = answers_with("ä".encode(), bench.tokenizer)
    body = (await a_client(bench).post(CHAT, json={**HI, "logprobs": True, "max_tokens": 2})).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA4]]


async def test_logprobs_of_a_text_streamed_and_whole(client: httpx.AsyncClient) -> None:
    asked = {"prompt": "a", "logprobs": 1, "max_tokens": 3}
    whole = (await client.post(TEXT, json=asked)).json()["choices"][0]["logprobs"]
    assert whole["tokens"] == ["h", "e", "l"]
    assert whole["text_offset"] == [0, 1, 2]
    assert whole["token_logprobs"] == [-0.5] * 3
    assert len(whole["top_logprobs"]) == 3
    chunks = events(await client.post(TEXT, json={**asked, "stream": True}))
    assert [at for chunk in chunks for at in chunk["choices"][0]["logprobs"]["text_offset"]] == [0, 1, 2]


async def test_log_probabilities_of_the_prompt_of_a_text_streamed_and_whole(
    bench: Bench, client: httpx.AsyncClient
) -> None:
    asked = {"prompt": "abc", "prompt_logprobs": 1, "max_tokens": 3}
    whole = (await client.post(TEXT, json=asked)).json()["choices"][0]["prompt_logprobs"]
    second, third = map(str, bench.tokenizer.encode("bc"))
    assert whole == [
        None,
        {second: {"logprob": -1.0, "rank": 1, "decoded_token": "b"}},
        {third: {"logprob": -2.0, "rank": 1, "decoded_token": "c"}},
    ]
    chunks = events(await client.post(TEXT, json={**asked, "stream": True}))
    assert [chunk["choices"][0]["prompt_logprobs"] for chunk in chunks] == [whole] + [None] * (len(chunks) - 1)
    own_alone = (await client.post(TEXT, json={**asked, "prompt_logprobs": 0})).json()["choices"][0]
    assert own_alone["prompt_logprobs"][1] == {second: {"logprob": -1.0, "rank": None, "decoded_token": "b"}}
    assert "prompt_logprobs" not in (await client.post(TEXT, json={"prompt": "abc"})).json()["choices"][0]


async def test_priority_and_the_key_s_tenant_reach_the_workers(bench: Bench) -> None:
    bench.workers.on_admit = answers_with(b"hello", bench.tokenizer)
    key = {"authorization": "Bearer k"}
    await a_client(bench, api_keys=["k"]).post(TEXT, json={"prompt": "a", "priority": 9}, headers=key)
    await a_client(bench).post(TEXT, json={"prompt": "a"}, headers=key)
    sent = [seat.request for seat in bench.workers.prefills]
    assert [request and (request.priority, request.tenant) for request in sent] == [
        (9, tenant_of("Bearer k")),
        (0, ""),
    ], "without keys nobody has looked at it, and it says nothing"


async def test_sampling_reaches_the_workers(bench: Bench, client: httpx.AsyncClient) -> None:
    fields = {"temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125, "seed": -1, "max_tokens": 4}
    await client.post(CHAT, json={**HI, **fields})
    request = bench.workers.prefills[0].request
    assert request
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 3, 0.125)
    assert (sampling.seed, sampling.max_tokens) == (2**64 - 1, 4)


async def test_penalties_bias_and_min_tokens_reach_the_workers(bench: Bench, client: httpx.AsyncClient) -> None:
    penalties = {"presence_penalty": -0.5, "frequency_penalty": 1, "repetition_penalty": 1.25}
    fields = {**penalties, "logit_bias": {"5": -100, "0": 1.5}, "min_tokens": 3, "max_tokens": 4}
    response = await client.post(CHAT, json={**HI, **fields})
    assert response.status_code == 200, response.text
    request = bench.workers.prefills[0].request
    assert request
    sampling = request.sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (-0.5, 1.0, 1.25)
    assert (sampling.logit_bias, sampling.min_tokens) == (((0, 1.5), (5, -100.0)), 3)


UNSUPPORTED: list[tuple[str, object]] = [
    ("tools", [{"type": "function"}]),
    ("tool_choice", "required"),
    ("functions", [{"name": "f"}]),
    ("function_call", {"name": "f"}),
    ("response_format", {"type": "json_object"}),
    ("length_penalty", 1.1),
    ("echo", True),
    ("suffix", "x"),
    ("best_of", 2),
    ("modalities", ["text", "audio"]),
    ("guided_json", {}),
    ("add_generation_prompt", False),
    ("skip_special_tokens", False),
    ("include_stop_str_in_output", True),
    ("truncate_prompt_tokens", 4),
    ("allowed_token_ids", [1]),
    ("prompt_logprobs", 1),
]


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED, ids=[name for name, _ in UNSUPPORTED])
async def test_what_is_not_supported_and_matters_is_refused_by_name(
    client: httpx.AsyncClient, name: str, value: object
) -> None:
    response = await client.post(CHAT, json={**HI, name: value})
    assert response.status_code == 400
    assert name in response.json()["error"]["message"]


async def test_what_asks_for_nothing_is_let_pass(client: httpx.AsyncClient) -> None:
    nothing = {
        "tools": [],
        "response_format": {"type": "text"},
        "logit_bias": {},
        "presence_penalty": 0.0,
        "repetition_penalty": 1,
        "min_tokens": 0,
        "echo": False,
    }
    nulls = dict.fromkeys(["suffix", "stop", "seed", "n", "temperature", "max_tokens", "stream", "logprobs", "audio"])
    response = await client.post(CHAT, json={**HI, **nothing, **nulls})
    assert response.status_code == 200, response.text


BAD: list[tuple[str, str, Any, int]] = [
    ("no messages", CHAT, {}, 400),
    ("messages a text", CHAT, {"messages": "hi"}, 400),
    ("an empty chat", CHAT, {"messages": []}, 400),
    ("a message without a role", CHAT, {"messages": [{"content": "x"}]}, 400),
    ("a message without content", CHAT, {"messages": [{"role": "user"}]}, 400),
    ("a message that is a text", CHAT, {"messages": ["x"]}, 400),
    ("an unknown role", CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400),
    ("an image", CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400),
    ("tool calls", CHAT, {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, 400),
    ("no prompt", TEXT, {}, 400),
    ("an empty list of tokens", TEXT, {"prompt": []}, 400),
    ("two prompts", TEXT, {"prompt": ["a", "b"]}, 400),
    ("a prompt of mixed kinds", TEXT, {"prompt": [1, "a"]}, 400),
    ("a token that is a fraction", TEXT, {"prompt": [1.5]}, 400),
    ("a token below 0", TEXT, {"prompt": [-1]}, 400),
    ("a token beyond the vocabulary", TEXT, {"prompt": [999]}, 400),
    ("a lone surrogate", TEXT, {"prompt": "\ud800"}, 400),
    ("a prompt beyond the context", TEXT, {"prompt": "x" * 100}, 400),
    ("max_tokens beyond the context", TEXT, {"prompt": "x", "max_tokens": 1000}, 400),
    ("max_tokens 0", TEXT, {"prompt": "x", "max_tokens": 0}, 400),
    ("max_tokens a text", TEXT, {"prompt": "x", "max_tokens": "8"}, 400),
    ("max_tokens true", TEXT, {"prompt": "x", "max_tokens": True}, 400),
    ("max_tokens huge", TEXT, {"prompt": "x", "max_tokens": 10**30}, 400),
    ("temperature a text", TEXT, {"prompt": "x", "temperature": "hot"}, 400),
    ("temperature huge", TEXT, {"prompt": "x", "temperature": 1e300}, 400),
    ("temperature below 0", TEXT, {"prompt": "x", "temperature": -1}, 400),
    ("presence_penalty 2.5", TEXT, {"prompt": "x", "presence_penalty": 2.5}, 400),
    ("frequency_penalty a text", TEXT, {"prompt": "x", "frequency_penalty": "1"}, 400),
    ("repetition_penalty 0", TEXT, {"prompt": "x", "repetition_penalty": 0}, 400),
    ("logit_bias a list", TEXT, {"prompt": "x", "logit_bias": [5]}, 400),
    ("logit_bias of a word", TEXT, {"prompt": "x", "logit_bias": {"word": 1}}, 400),
    ("logit_bias of a token below 0", TEXT, {"prompt": "x", "logit_bias": {"-1": 1}}, 400),
    ("logit_bias of a token in other digits", TEXT, {"prompt": "x", "logit_bias": {"\u0665": 1}}, 400),
    ("logit_bias of a token twice", TEXT, {"prompt": "x", "logit_bias": {"5": 1, "05": 2}}, 400),
    ("logit_bias of a token beyond 32 bits", TEXT, {"prompt": "x", "logit_bias": {"4294967296": 1}}, 400),
    ("logit_bias of a token beyond the vocabulary", TEXT, {"prompt": "x", "logit_bias": {"999": 1}}, 400),
    ("logit_bias of a huge key", TEXT, {"prompt": "x", "logit_bias": {"9" * 9000: 1}}, 400),
    ("logit_bias true", TEXT, {"prompt": "x", "logit_bias": {"5": True}}, 400),
    ("logit_bias null", TEXT, {"prompt": "x", "logit_bias": {"5": None}}, 400),
    ("logit_bias 101", TEXT, {"prompt": "x", "logit_bias": {"5": 101}}, 400),
    ("min_tokens above max_tokens", TEXT, {"prompt": "x", "min_tokens": 3, "max_tokens": 2}, 400),
    ("min_tokens above the default of max_tokens", TEXT, {"prompt": "x", "min_tokens": 17}, 400),
    ("min_tokens below 0", TEXT, {"prompt": "x", "min_tokens": -1}, 400),
    ("n 0", TEXT, {"prompt": "x", "n": 0}, 400),
    ("n 17", TEXT, {"prompt": "x", "n": 17}, 400),
    ("stop of numbers", TEXT, {"prompt": "x", "stop": [1]}, 400),
    ("stop an object", TEXT, {"prompt": "x", "stop": {}}, 400),
    ("stream a text", TEXT, {"prompt": "x", "stream": "yes"}, 400),
    ("stream options without a stream", TEXT, {"prompt": "x", "stream_options": {"include_usage": True}}, 400),
    ("stream options that are none", TEXT, {"prompt": "x", "stream": True, "stream_options": 1}, 400),
    ("seed beyond 64 bits", TEXT, {"prompt": "x", "seed": 2**64}, 400),
    ("top_logprobs alone", CHAT, {**HI, "top_logprobs": 2}, 400),
    ("top_logprobs 21", CHAT, {**HI, "logprobs": True, "top_logprobs": 21}, 400),
    ("logprobs a number in a chat", CHAT, {**HI, "logprobs": 3}, 400),
    ("an unknown model", CHAT, {**HI, "model": "gpt-17"}, 404),
    ("a list", CHAT, [], 400),
    ("null", CHAT, None, 400),
]


@pytest.mark.parametrize(("path", "body", "status"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
async def test_a_bad_request_gets_openai_s_error(client: httpx.AsyncClient, path: str, body: Any, status: int) -> None:
    data = json.dumps(body)  # in ASCII, which a lone surrogate survives
    response = await client.post(path, content=data, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b'{"prompt": NaN}', b"[" * 9000, b"9" * 9000])
async def test_what_is_no_json_is_refused(client: httpx.AsyncClient, data: bytes) -> None:
    assert (await client.post(TEXT, content=data)).status_code == 400


async def test_a_body_beyond_the_bound_is_refused(client: httpx.AsyncClient) -> None:
    response = await client.post(TEXT, json={"prompt": "x" * 20_000})
    assert response.status_code == 413
    assert response.json()["error"]["message"]


async def test_unknown_paths_and_methods_get_the_same_kind_of_error(client: httpx.AsyncClient) -> None:
    assert (await client.get("/nowhere")).json()["error"]["message"]
    response = await client.get(CHAT)
    assert response.status_code == 405
    assert response.json()["error"]["message"]


async def test_a_key_is_asked_for(bench: Bench) -> None:
    bench.workers.on_admit = answers_with(b"hello", bench.tokenizer)
    client = a_client(bench, api_keys=["one", "two"])
    for headers in ({}, {"authorization": "Bearer three"}, {"authorization": "one"}, {"authorization": "Bearer "}):
        response = await client.post(CHAT, json=HI, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert (await client.post(CHAT, json=HI, headers={"authorization": "Bearer two"})).status_code == 200


async def test_what_is_refused_at_the_door_is_counted(bench: Bench) -> None:
    refused: list[str] = []
    client = a_client(bench, api_keys=["k"], on_refused=refused.append)
    key = {"authorization": "Bearer k"}
    await client.post(CHAT, content=b"{", headers=key)
    await client.post(CHAT, json={**HI, "n": "many"}, headers=key)
    await client.post(CHAT, json=HI)
    await client.get("/v1/models")
    assert refused == ["InvalidRequest", "InvalidRequest", "NotAuthenticated"]


async def test_the_web_server_is_silent_about_itself(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    door = HttpDoor(build_app(bench.inference, max_body_bytes=1000), "127.0.0.1", 0)
    await door.start()
    await turns(10)
    await door.close()
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


async def test_a_failure_has_a_status_of_its_own(bench: Bench) -> None:
    for code, status in (("Overloaded", 429), ("WorkerLost", 503), ("DeadlineExceeded", 504), ("CorruptPiece", 503)):
        bench.workers.on_admit = lambda seat, code=code: asyncio.get_running_loop().call_soon(
            seat.end, EndReason.FAILED, code, "sorry"
        )
        for stream in (False, True):
            response = await a_client(bench).post(CHAT, json={**HI, "stream": stream})
            assert response.status_code == status
            assert response.json()["error"]["message"] == "sorry"


async def test_a_mistake_of_ours_is_a_500_that_tells_nothing(bench: Bench) -> None:
    bench.workers.on_admit = lambda seat: asyncio.get_running_loop().call_soon(seat.tell, News(tokens=(None,)))  # type: ignore[arg-type]
    app = build_app(bench.inference, max_body_bytes=1000)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        response = await client.post(CHAT, json=HI)
    assert response.status_code == 500
    assert "internal" in response.json()["error"]["message"]


async def test_a_failure_in_a_stream_is_an_event(bench: Bench, tokenizer: Tokenizer) -> None:
    def on_admit(seat: Any) -> None:
        if seat.worker_id == "prefill":
            asyncio.get_running_loop().call_soon(seat.tokens, 0, tokenizer.encode("h"))
        else:
            asyncio.get_running_loop().call_later(0.01, seat.end, EndReason.FAILED, "GeometryMismatch", "sorry")

    bench.workers.on_admit = on_admit
    chunks = events(await a_client(bench).post(CHAT, json={**HI, "stream": True}))
    assert chunks[1]["choices"][0]["delta"]["content"] == "h"
    assert chunks[-1]["error"]["message"] == "sorry"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels(bench: Bench, stream: bool) -> None:
    door = HttpDoor(build_app(bench.inference, max_body_bytes=1000), "127.0.0.1", 0)
    await door.start()
    try:
        host, port = door.address.rsplit(":", 1)
        _, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps({**HI, "stream": stream}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await until(lambda: bool(bench.workers.prefills))
        await turns()
        if stream:
            bench.workers.prefills[0].tokens(0, [70])
            await turns()
        writer.close()
        await until(lambda: not bench.records.running)
    finally:
        await door.close()
    bench.workers.assert_all_released()


async def test_two_doors_can_not_share_a_port(bench: Bench) -> None:
    app = build_app(bench.inference, max_body_bytes=1000)
    door = HttpDoor(app, "127.0.0.1", 0)
    with pytest.raises(Exception, match="choose another"):
        HttpDoor(app, "127.0.0.1", int(door.address.rsplit(":", 1)[1]))
    await door.close()
