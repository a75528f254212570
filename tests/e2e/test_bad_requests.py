"""A hundred requests at and beyond every limit get the right status each, and never INTERNAL or UNKNOWN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import grpc

from baton.v1 import inference_pb2 as pb

from .cluster import Cluster
from .ledgers import assert_clean

OK = grpc.StatusCode.OK
INVALID = grpc.StatusCode.INVALID_ARGUMENT
RANGE = grpc.StatusCode.OUT_OF_RANGE
NOT_FOUND = grpc.StatusCode.NOT_FOUND
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
CONFLICT = grpc.StatusCode.ALREADY_EXISTS
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
VOCAB = 4096
CONTEXT = 4096
HELLO = pb.TokenIds(ids=[300, 301, 302])


@dataclass(frozen=True)
class Case:
    name: str
    method: str
    request: Any
    status: grpc.StatusCode


def sampling(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=HELLO, sampling=pb.SamplingParams(**{"max_tokens": 1, **fields}))


def sampling_cases() -> list[Case]:
    table: list[tuple[str, dict[str, Any], grpc.StatusCode]] = [
        ("max_tokens 0", {"max_tokens": 0}, INVALID),
        ("max_tokens 1", {"max_tokens": 1}, OK),
        ("max_tokens over the context", {"max_tokens": CONTEXT + 1}, RANGE),
        ("max_tokens at the type's end", {"max_tokens": 2**32 - 1}, RANGE),
        ("temperature 0", {"temperature": 0.0}, OK),
        ("temperature tiny", {"temperature": 1e-30}, OK),
        ("temperature 2", {"temperature": 2.0}, OK),
        ("temperature negative", {"temperature": -0.1}, INVALID),
        ("temperature huge", {"temperature": 1e9}, INVALID),
        ("temperature NaN", {"temperature": math.nan}, INVALID),
        ("temperature infinite", {"temperature": math.inf}, INVALID),
        ("temperature minus infinite", {"temperature": -math.inf}, INVALID),
        ("top_p 1", {"top_p": 1.0}, OK),
        ("top_p small", {"top_p": 1e-6}, OK),
        ("top_p 0", {"top_p": 0.0}, INVALID),
        ("top_p over 1", {"top_p": 1.01}, INVALID),
        ("top_p negative", {"top_p": -0.5}, INVALID),
        ("top_p NaN", {"top_p": math.nan}, INVALID),
        ("top_p infinite", {"top_p": math.inf}, INVALID),
        ("top_k 0", {"top_k": 0}, OK),
        ("top_k 1", {"top_k": 1}, OK),
        ("top_k of the vocabulary", {"top_k": VOCAB}, OK),
        ("min_p 0", {"min_p": 0.0}, OK),
        ("min_p 1", {"min_p": 1.0}, OK),
        ("min_p over 1", {"min_p": 1.5}, INVALID),
        ("min_p negative", {"min_p": -0.01}, INVALID),
        ("min_p NaN", {"min_p": math.nan}, INVALID),
        ("repetition_penalty 2", {"repetition_penalty": 2.0}, OK),
        ("repetition_penalty 0", {"repetition_penalty": 0.0}, INVALID),
        ("repetition_penalty NaN", {"repetition_penalty": math.nan}, INVALID),
        ("presence_penalty -2", {"presence_penalty": -2.0}, OK),
        ("presence_penalty over 2", {"presence_penalty": 2.1}, INVALID),
        ("frequency_penalty 2", {"frequency_penalty": 2.0}, OK),
        ("frequency_penalty infinite", {"frequency_penalty": math.inf}, INVALID),
        ("logit_bias at the vocabulary's end", {"logit_bias": {VOCAB - 1: -100.0}}, OK),
        ("logit_bias beyond it", {"logit_bias": {VOCAB: 1.0}}, INVALID),
        ("logit_bias over 100", {"logit_bias": {5: 100.5}}, INVALID),
        ("logit_bias 300 of them", {"logit_bias": dict.fromkeys(range(300), 1.0)}, OK),
        ("logit_bias 301 of them", {"logit_bias": dict.fromkeys(range(301), 1.0)}, INVALID),
        ("min_tokens of max_tokens", {"min_tokens": 1}, OK),
        ("min_tokens over max_tokens", {"min_tokens": 2}, INVALID),
        ("seed 0", {"seed": 0}, OK),
        ("seed at the type's end", {"seed": 2**64 - 1}, OK),
        ("n 0", {"n": 0}, INVALID),
        ("n 1", {"n": 1}, OK),
        ("n 16", {"n": 16}, OK),
        ("n 17", {"n": 17}, INVALID),
        ("n at the type's end", {"n": 2**32 - 1}, INVALID),
        ("stop empty", {"stop": [""]}, INVALID),
        ("stop of 256 bytes", {"stop": ["s" * 256]}, OK),
        ("stop of 257 bytes", {"stop": ["s" * 257]}, INVALID),
        ("stop of 257 bytes in few characters", {"stop": ["ä" * 129]}, INVALID),
        ("stop 16 of them", {"stop": [f"stop {i}" for i in range(16)]}, OK),
        ("stop 17 of them", {"stop": [f"stop {i}" for i in range(17)]}, INVALID),
        ("stop a megabyte", {"stop": ["x" * 2**20]}, INVALID),
        ("stop_token_ids 64 of them", {"stop_token_ids": list(range(64))}, OK),
        ("stop_token_ids 65 of them", {"stop_token_ids": list(range(65))}, INVALID),
        ("stop_token_ids at the vocabulary's end", {"stop_token_ids": [VOCAB - 1]}, OK),
        ("stop_token_ids beyond it", {"stop_token_ids": [VOCAB]}, INVALID),
        ("stop_token_ids at the type's end", {"stop_token_ids": [2**32 - 1]}, INVALID),
        ("ignore_eos", {"ignore_eos": True}, OK),
        ("logprobs 0", {"logprobs": 0}, OK),
        ("logprobs 20", {"logprobs": 20}, OK),
        ("logprobs 21", {"logprobs": 21}, INVALID),
        ("logprobs at the type's end", {"logprobs": 2**32 - 1}, INVALID),
    ]
    return [Case(name, "Generate", sampling(**fields), status) for name, fields, status in table]


def generate(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(sampling=pb.SamplingParams(max_tokens=1), **fields)


def chat(*messages: tuple[str, str]) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role=role, content=content) for role, content in messages])


def input_cases() -> list[Case]:
    table: list[tuple[str, dict[str, Any], grpc.StatusCode]] = [
        ("no input", {}, INVALID),
        ("text empty", {"text": ""}, OK),  # the tokenizer adds a beginning of sequence
        ("text a blank", {"text": " "}, OK),
        ("text of every ASCII character", {"text": "".join(map(chr, range(128)))}, OK),
        ("text of far planes", {"text": "\U0001f9ea\U0010ffff\u200b\ufeff"}, OK),
        ("text with special tokens written out", {"text": "<|bos|><|eos|></s><s>"}, OK),
        ("text beyond the context", {"text": "word " * 6000}, RANGE),
        ("text of three megabytes", {"text": "a" * (3 * 2**20)}, RANGE),
        ("text of 40 megabytes", {"text": "a" * (40 * 2**20)}, EXHAUSTED),
        ("token_ids empty", {"token_ids": pb.TokenIds()}, INVALID),
        ("token_ids one", {"token_ids": pb.TokenIds(ids=[5])}, OK),
        ("token_ids the last", {"token_ids": pb.TokenIds(ids=[VOCAB - 1])}, OK),
        ("token_ids beyond the vocabulary", {"token_ids": pb.TokenIds(ids=[VOCAB])}, INVALID),
        ("token_ids at the type's end", {"token_ids": pb.TokenIds(ids=[2**32 - 1])}, INVALID),
        ("token_ids one bad among good", {"token_ids": pb.TokenIds(ids=[5] * 100 + [VOCAB])}, INVALID),
        ("token_ids that leave room for one", {"token_ids": pb.TokenIds(ids=[400] * (CONTEXT - 1))}, OK),
        ("token_ids that fill the context", {"token_ids": pb.TokenIds(ids=[400] * CONTEXT)}, RANGE),
        ("token_ids over the context", {"token_ids": pb.TokenIds(ids=[400] * (CONTEXT + 1))}, RANGE),
        ("token_ids a million", {"token_ids": pb.TokenIds(ids=[400] * 1_000_000)}, RANGE),
        ("chat empty", {"chat": pb.Chat()}, INVALID),
        ("chat of a user", {"chat": chat(("user", "Hello"))}, OK),
        ("chat with a system message", {"chat": chat(("system", "Be brief."), ("user", "Hello"))}, OK),
        ("chat with an empty message", {"chat": chat(("user", ""))}, OK),
        ("chat without a role", {"chat": chat(("", "Hello"))}, INVALID),
        ("chat of an unknown role", {"chat": chat(("wizard", "Hello"))}, INVALID),
        ("chat with a role of a megabyte", {"chat": chat(("r" * 2**20, "Hello"))}, INVALID),
        ("chat beyond the context", {"chat": chat(("user", "word " * 6000))}, RANGE),
        ("chat of 5,000 messages", {"chat": chat(*[("user", "a"), ("assistant", "b")] * 2500)}, INVALID),
        ("model named", {"model": "baton-docs-6m", "token_ids": HELLO}, OK),
        ("model unknown", {"model": "gpt-17", "token_ids": HELLO}, NOT_FOUND),
        ("model a path", {"model": "../../etc/passwd", "token_ids": HELLO}, NOT_FOUND),
        ("model a megabyte", {"model": "m" * 2**20, "token_ids": HELLO}, NOT_FOUND),
        ("request_id of 128", {"request_id": "r" * 128, "token_ids": HELLO}, OK),
        ("request_id of 129", {"request_id": "r" * 129, "token_ids": HELLO}, INVALID),
        ("request_id with a line break", {"request_id": "a\nb", "token_ids": HELLO}, INVALID),
        ("request_id with a NUL", {"request_id": "a\0b", "token_ids": HELLO}, INVALID),
        ("request_id not ASCII", {"request_id": "naïve", "token_ids": HELLO}, INVALID),
        ("request_id used for another request", {"request_id": "r" * 128, "text": "other"}, CONFLICT),
        (
            "resume of a request that is not known",
            {"request_id": "never-seen", "token_ids": HELLO, "stream": pb.StreamOptions(resume_after_seq=2**64 - 1)},
            NOT_FOUND,
        ),
        ("final only", {"token_ids": HELLO, "stream": pb.StreamOptions(final_only=True)}, OK),
    ]
    return [Case(name, "Generate", generate(**fields), status) for name, fields, status in table]


def other_cases() -> list[Case]:
    return [
        Case("tokenize nothing", "Tokenize", pb.TokenizeRequest(), INVALID),
        Case("tokenize empty text", "Tokenize", pb.TokenizeRequest(text=""), OK),
        Case("tokenize for an unknown model", "Tokenize", pb.TokenizeRequest(model="x", text="a"), NOT_FOUND),
        Case("tokenize an empty chat", "Tokenize", pb.TokenizeRequest(chat=pb.Chat()), INVALID),
        Case("detokenize nothing", "Detokenize", pb.DetokenizeRequest(), OK),
        Case("detokenize beyond the vocabulary", "Detokenize", pb.DetokenizeRequest(token_ids=[VOCAB]), INVALID),
        Case(
            "detokenize for an unknown model", "Detokenize", pb.DetokenizeRequest(model="x", token_ids=[5]), NOT_FOUND
        ),
        Case("get no model", "GetModel", pb.GetModelRequest(), OK),
        Case("get an unknown model", "GetModel", pb.GetModelRequest(model="x"), NOT_FOUND),
        Case("cancel without a name", "Cancel", pb.CancelRequest(), INVALID),
        Case("cancel of the unknown", "Cancel", pb.CancelRequest(request_id="never-seen"), OK),
        Case("cancel with a bad name", "Cancel", pb.CancelRequest(request_id="\n"), INVALID),
        Case("explain without a name", "Explain", pb.ExplainRequest(), INVALID),
        Case("explain the unknown", "Explain", pb.ExplainRequest(request_id="never-seen"), NOT_FOUND),
        Case("a method that is not there", "Destroy", pb.ExplainRequest(), UNIMPLEMENTED),
    ]


def garbage_cases() -> list[Case]:
    """Bytes that are no message: wrong wire types, cut short, text that is not UTF-8."""
    return [
        Case("garbage", "Generate", b"\xff" * 64, INVALID),
        Case(
            "a cut message", "Generate", generate(text="hello there").SerializeToString()[:-20] + b"\x12\x7f", INVALID
        ),
        Case("a number where a text belongs", "Generate", b"\x12\xff", INVALID),
        Case("text that is not UTF-8", "Generate", b"\x1a\x02\xc3\x28", INVALID),
        Case("a length beyond the message", "Tokenize", b"\x12\xff\xff\xff\xff\x0f", INVALID),
    ]


CASES = sampling_cases() + input_cases() + other_cases() + garbage_cases()


def as_bytes(message: Any) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def outcome(channel: grpc.Channel, case: Case) -> grpc.StatusCode:
    """Sends the bytes themselves, so that what no client library would send can be sent too."""
    path = f"/baton.v1.InferenceService/{case.method}"
    kind = channel.unary_stream if case.method == "Generate" else channel.unary_unary
    call = kind(path, request_serializer=as_bytes)
    try:
        answer = call(case.request, timeout=60)
        if case.method == "Generate":
            list(answer)
    except grpc.RpcError as error:
        code = error.code()
        assert isinstance(code, grpc.StatusCode)
        assert error.details(), "an error without a word"
        assert len(error.details()) < 600, "an error as long as what was sent"
        return code
    return OK


def test_the_table_holds_at_least_100_cases() -> None:
    assert len(CASES) >= 100
    assert len({case.name for case in CASES}) == len(CASES)


def test_every_bad_request_gets_the_right_status(cluster: Cluster) -> None:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(cluster.grpc_address, options=options) as channel:
        wrong = [
            (case.name, case.status.name, got.name)
            for case in CASES
            if (got := outcome(channel, case)) is not case.status
        ]
    assert not wrong, "\n".join(f"{name}: {expected} expected, {got} given" for name, expected, got in wrong)
    assert_clean(cluster)
