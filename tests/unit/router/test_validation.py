"""At and beyond every limit of every field: what is refused, and with which status."""

import math
from dataclasses import replace
from typing import Any

import grpc
import pytest

from baton.core.errors import BatonError, ContextExceeded, InvalidRequest
from baton.core.request import Sampling
from baton.router.validation import Draft, check_request_id, draft
from baton.text.generation_config import GenerationDefaults
from baton.text.settling import ModelLimits, settle
from baton.v1 import inference_pb2 as pb
from baton.wire.interceptors import STATUS

VOCAB = 4096
CONTEXT = 2048
MODEL = ModelLimits(name="m", max_model_len=CONTEXT, vocab_size=VOCAB)
DEFAULTS = GenerationDefaults(eos_token_ids=frozenset({2}))
OK = None
INVALID = grpc.StatusCode.INVALID_ARGUMENT
RANGE = grpc.StatusCode.OUT_OF_RANGE
NOT_FOUND = grpc.StatusCode.NOT_FOUND
U32 = 2**32 - 1
U64 = 2**64 - 1


def tokens(*ids: int) -> pb.TokenIds:
    return pb.TokenIds(ids=ids)


def sampling(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=tokens(5, 6), sampling=pb.SamplingParams(**fields))


def chat(*messages: tuple[str, str]) -> pb.GenerateRequest:
    turns = [pb.ChatMessage(role=role, content=content) for role, content in messages]
    return pb.GenerateRequest(chat=pb.Chat(messages=turns))


def ids(*values: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=tokens(*values))


def named(request_id: str, **stream: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(request_id=request_id, text="a", stream=pb.StreamOptions(**stream))


def model(name: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(model=name, text="a")


FLOATS = [
    (name, value)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty")
    for value in (math.nan, math.inf, -math.inf, -1e-3, -1.0, -3e38, 101.0, 1e30, 3e38, -math.nan)
]
PENALTIES = [
    (name, value)
    for name in ("presence_penalty", "frequency_penalty")
    for value in (math.nan, math.inf, -math.inf, 2.001, -2.001, 3e38, -3e38)
]
CASES: list[tuple[str, pb.GenerateRequest, grpc.StatusCode | None]] = [
    *[(f"{name} {value} ({at})", sampling(**{name: value}), INVALID) for at, (name, value) in enumerate(FLOATS)],
    *[(f"{name} {value} ({at})", sampling(**{name: value}), INVALID) for at, (name, value) in enumerate(PENALTIES)],
    *[
        (f"{name} {value}", sampling(**{name: value}), OK)
        for name in ("presence_penalty", "frequency_penalty")
        for value in (-2.0, -0.0, 0.0, 1e-30, 2.0)
    ],
    ("repetition_penalty 0", sampling(repetition_penalty=0.0), INVALID),
    ("repetition_penalty tiny", sampling(repetition_penalty=1e-30), OK),
    ("repetition_penalty 1", sampling(repetition_penalty=1.0), OK),
    ("repetition_penalty 2", sampling(repetition_penalty=2.0), OK),
    ("repetition_penalty a hair over 2", sampling(repetition_penalty=2.001), INVALID),
    *[
        (f"a logit_bias of {bias}", sampling(logit_bias={5: bias}), OK if -100 <= bias <= 100 else INVALID)
        for bias in (-100.0, 0.0, 100.0, 100.1, -100.1, 3e38, math.nan, math.inf, -math.inf)
    ],
    *[
        (f"a logit_bias of token {token}", sampling(logit_bias={token: 1.0}), OK if token < VOCAB else INVALID)
        for token in (0, VOCAB - 1, VOCAB, U32)
    ],
    *[
        (
            f"{count} logit biases",
            sampling(logit_bias=dict.fromkeys(range(count), 1.0)),
            OK if count <= 300 else INVALID,
        )
        for count in (0, 1, 299, 300, 301, 4000)
    ],
    ("a bad logit_bias among good ones", sampling(logit_bias={**dict.fromkeys(range(9), 1.0), 4: 101.0}), INVALID),
    ("min_tokens 0", sampling(min_tokens=0), OK),
    ("min_tokens of max_tokens", sampling(min_tokens=7, max_tokens=7), OK),
    ("min_tokens above max_tokens", sampling(min_tokens=8, max_tokens=7), INVALID),
    ("min_tokens at the type's end, above max_tokens", sampling(min_tokens=U32, max_tokens=7), INVALID),
    ("min_tokens that fill the context", sampling(min_tokens=CONTEXT - 2), OK),
    ("min_tokens one too many", sampling(min_tokens=CONTEXT - 1), RANGE),
    ("min_tokens of the context", sampling(min_tokens=CONTEXT), RANGE),
    ("min_tokens at the type's end", sampling(min_tokens=U32), RANGE),
    ("max_tokens 0", sampling(max_tokens=0), INVALID),
    ("max_tokens 1", sampling(max_tokens=1), OK),
    ("max_tokens that fill the context", sampling(max_tokens=CONTEXT - 2), OK),
    ("max_tokens one too many", sampling(max_tokens=CONTEXT - 1), RANGE),
    ("max_tokens of the context", sampling(max_tokens=CONTEXT), RANGE),
    ("max_tokens beyond it", sampling(max_tokens=CONTEXT + 1), RANGE),
    ("max_tokens at the type's end", sampling(max_tokens=U32), RANGE),
    ("temperature 0", sampling(temperature=0.0), OK),
    ("temperature minus 0", sampling(temperature=-0.0), OK),
    ("temperature tiny", sampling(temperature=1e-38), OK),
    ("temperature 100", sampling(temperature=100.0), OK),
    ("temperature a hair over 100", sampling(temperature=100.001), INVALID),
    ("top_p 0", sampling(top_p=0.0), INVALID),
    ("top_p minus 0", sampling(top_p=-0.0), INVALID),
    ("top_p tiny", sampling(top_p=1e-30), OK),
    ("top_p 1", sampling(top_p=1.0), OK),
    ("top_p a hair over 1", sampling(top_p=1.0001), INVALID),
    ("min_p 0", sampling(min_p=0.0), OK),
    ("min_p 1", sampling(min_p=1.0), OK),
    ("min_p a hair over 1", sampling(min_p=1.0001), INVALID),
    ("top_k 0", sampling(top_k=0), OK),
    ("top_k of the vocabulary", sampling(top_k=VOCAB), OK),
    ("top_k beyond it is all tokens", sampling(top_k=U32), OK),
    ("seed 0", sampling(seed=0), OK),
    ("seed at the type's end", sampling(seed=U64), OK),
    *[(f"n {n}", sampling(n=n), OK if 1 <= n <= 16 else INVALID) for n in (0, 1, 2, 15, 16, 17, 100, U32)],
    *[
        (f"{count} stop strings", sampling(stop=[f"s{i}" for i in range(count)]), OK if count <= 16 else INVALID)
        for count in (0, 1, 15, 16, 17, 1000)
    ],
    ("a stop string that is empty", sampling(stop=[""]), INVALID),
    ("an empty stop string among others", sampling(stop=["a", "", "b"]), INVALID),
    *[
        (f"a stop string of {size} bytes", sampling(stop=["x" * size]), OK if size <= 256 else INVALID)
        for size in (1, 255, 256, 257, 10_000, 1_000_000)
    ],
    ("a stop string of 128 two-byte characters", sampling(stop=["ä" * 128]), OK),
    ("a stop string of 129 two-byte characters", sampling(stop=["ä" * 129]), INVALID),
    ("a stop string of 64 four-byte characters", sampling(stop=["🧪" * 64]), OK),
    ("a stop string of 65 four-byte characters", sampling(stop=["🧪" * 65]), INVALID),
    *[
        (f"{count} stop_token_ids", sampling(stop_token_ids=range(count)), OK if count <= 64 else INVALID)
        for count in (0, 1, 63, 64, 65, 4096)
    ],
    *[
        (f"stop_token_ids {token}", sampling(stop_token_ids=[token]), OK if token < VOCAB else INVALID)
        for token in (0, VOCAB - 1, VOCAB, VOCAB + 1, U32)
    ],
    *[
        (f"prompt_logprobs {k}", sampling(prompt_logprobs=k), OK if k <= 20 else INVALID)
        for k in (0, 1, 19, 20, 21, 4096, U32)
    ],
    *[
        (f"priority {p}", pb.GenerateRequest(text="a", priority=p), OK if -100 <= p <= 100 else INVALID)
        for p in (-(2**31), -101, -100, 0, 100, 101, 2**31 - 1)
    ],
    *[(f"logprobs {k}", sampling(logprobs=k), OK if k <= 20 else INVALID) for k in (0, 1, 19, 20, 21, 4096, U32)],
    ("ignore_eos", sampling(ignore_eos=True), OK),
    ("no input", pb.GenerateRequest(), INVALID),
    ("no input but sampling", pb.GenerateRequest(sampling=pb.SamplingParams(n=1)), INVALID),
    ("an empty text", pb.GenerateRequest(text=""), OK),
    ("a text", pb.GenerateRequest(text="hello"), OK),
    ("no token ids", ids(), INVALID),
    *[(f"token id {token}", ids(token), OK if token < VOCAB else INVALID) for token in (0, 4095, 4096, 2**31, U32)],
    ("one bad token id among good ones", ids(*[5] * 100, VOCAB, 5), INVALID),
    ("token ids that leave room for one", ids(*[5] * (CONTEXT - 1)), OK),
    ("token ids that fill the context", ids(*[5] * CONTEXT), RANGE),
    ("token ids beyond the context", ids(*[5] * (CONTEXT + 1)), RANGE),
    ("a hundred thousand token ids", ids(*[5] * 100_000), RANGE),
    ("bad token ids beyond the context", ids(*[U32] * (CONTEXT + 1)), RANGE),
    ("a chat without messages", chat(), INVALID),
    ("a chat", chat(("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "u")), OK),
    ("a chat with an empty message", chat(("user", "")), OK),
    *[
        (f"a chat with the role {role[:20]!r} of {len(role)}", chat(("user", "u"), (role, "x")), INVALID)
        for role in ("", "wizard", "User", "user ", "tool", "developer", "r" * 1_000_000)
    ],
    *[
        (f"a chat of {count} messages", chat(*[("user", "u")] * count), OK if count <= 1024 else INVALID)
        for count in (1, 1024, 1025, 5000)
    ],
    *[
        (f"a request_id of {size}", named("r" * size), OK if size <= 128 else INVALID)
        for size in (0, 1, 128, 129, 10**6)
    ],
    *[
        (f"a request_id with {bad!r}", named(f"a{bad}b"), INVALID)
        for bad in ("\n", "\0", "\r", "\t", "\x1f", "\x7f", "é", "\u2028", "😀")
    ],
    ("a request_id that ends with a line break", named("a\n"), INVALID),
    ("a request_id of all printable ASCII", named("".join(map(chr, range(32, 127)))), OK),
    ("resuming without a request_id", named("", resume_after_seq=1), INVALID),
    ("resuming at the type's end", named("r", resume_after_seq=U64), OK),
    ("final only", named("r", final_only=True), OK),
    ("the model by name", model("m"), OK),
    *[
        (f"the model {name[:20]!r} of {len(name)}", model(name), NOT_FOUND)
        for name in ("M", "m ", "gpt-17", "../../etc/passwd", "m\0", "m" * 1_000_000)
    ],
]


def refusal(request: pb.GenerateRequest, prompt: int | None = None) -> BatonError | None:
    try:
        drafted = draft(request, MODEL, DEFAULTS)
        settle(drafted, prompt if prompt is not None else len(drafted.prompt.token_ids or (1, 2)), 1, MODEL, DEFAULTS)
    except BatonError as error:
        return error
    return None


def status_of(error: BatonError | None) -> grpc.StatusCode | None:
    return None if error is None else STATUS[type(error)]


def test_the_table_is_long_and_has_no_case_twice() -> None:
    assert sum(status is not OK for _, _, status in CASES) >= 100
    assert len({name for name, _, _ in CASES}) == len(CASES)


@pytest.mark.parametrize(("request_", "status"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_every_request_gets_its_status(request_: pb.GenerateRequest, status: grpc.StatusCode | None) -> None:
    error = refusal(request_)
    assert status_of(error) is status
    assert error is None or 0 < len(str(error)) < 300, "a refusal without a word, or as long as what was sent"


def drafted(request: pb.GenerateRequest, defaults: GenerationDefaults = DEFAULTS) -> Draft:
    return draft(request, MODEL, defaults)


def settled(request: pb.GenerateRequest, prompt: int = 10, defaults: GenerationDefaults = DEFAULTS) -> list[Sampling]:
    return settle(drafted(request, defaults), prompt, 9, MODEL, defaults)


def test_absent_fields_have_the_field_s_usual_defaults() -> None:
    (only,) = settled(ids(5))
    assert only == Sampling(max_tokens=CONTEXT - 10, seed=9, stop_token_ids=frozenset({2}))


def test_the_model_s_own_defaults_come_before_those() -> None:
    model_s = replace(DEFAULTS, temperature=0.6, top_p=0.9, top_k=50, min_p=0.1, max_new_tokens=100)
    (only,) = settled(ids(5), defaults=model_s)
    assert (only.temperature, only.top_p, only.top_k, only.min_p, only.max_tokens) == (0.6, 0.9, 50, 0.1, 100)
    assert settled(ids(5), defaults=replace(DEFAULTS, repetition_penalty=1.1))[0].repetition_penalty == 1.1
    (near_the_end,) = settled(ids(5), prompt=CONTEXT - 3, defaults=model_s)
    assert near_the_end.max_tokens == 3


def test_what_the_client_says_comes_before_all_defaults_zero_too() -> None:
    model_s = replace(DEFAULTS, temperature=0.6, top_k=50, min_p=0.1, repetition_penalty=1.1)
    (only,) = settled(sampling(temperature=0, top_k=0, min_p=0, repetition_penalty=1), defaults=model_s)
    assert (only.temperature, only.top_k, only.min_p, only.repetition_penalty) == (0.0, 0, 0.0, 1.0)


def test_top_k_beyond_the_vocabulary_is_all_of_it() -> None:
    assert settled(sampling(top_k=U32))[0].top_k == VOCAB


def test_biases_rise_by_token_and_those_of_nothing_are_left_out() -> None:
    (only,) = settled(sampling(logit_bias={9: 1.5, 3: -100.0, 5: 0.0}))
    assert only.logit_bias == ((3, -100.0), (9, 1.5))


def test_min_tokens_must_fit_what_an_answer_may_have_without_max_tokens() -> None:
    brief = replace(DEFAULTS, max_new_tokens=20)
    assert settled(sampling(min_tokens=20), defaults=brief)[0].min_tokens == 20
    with pytest.raises(InvalidRequest, match="min_tokens is 21"):
        settled(sampling(min_tokens=21), defaults=brief)
    with pytest.raises(ContextExceeded, match="min_tokens is 50"):
        settled(sampling(min_tokens=50), prompt=CONTEXT - 49)


def test_an_end_of_sequence_beyond_the_vocabulary_never_comes_and_is_left_out() -> None:
    odd = replace(DEFAULTS, eos_token_ids=frozenset({2, VOCAB}))
    assert settled(ids(5), defaults=odd)[0].stop_token_ids == {2}


def test_n_answers_differ_in_their_branch_alone() -> None:
    three = settled(sampling(n=3))
    assert [entry.branch for entry in three] == [0, 1, 2]
    assert len({replace(entry, branch=0) for entry in three}) == 1


def test_ignoring_ends_of_sequence_keeps_the_client_s_stop_tokens() -> None:
    assert settled(sampling(stop_token_ids=[7]))[0].stop_token_ids == {2, 7}
    assert settled(sampling(stop_token_ids=[7], ignore_eos=True))[0].stop_token_ids == {7}


@pytest.mark.parametrize(("prompt", "status"), [(0, INVALID), (CONTEXT - 1, OK), (CONTEXT, RANGE), (10**9, RANGE)])
def test_a_prompt_leaves_room_for_one_token_at_least(prompt: int, status: grpc.StatusCode | None) -> None:
    assert status_of(refusal(pb.GenerateRequest(text="a"), prompt)) is status


def test_the_digest_is_of_the_request_and_not_of_its_name_or_stream() -> None:
    one = named("a", resume_after_seq=3)
    other = named("b", final_only=True)
    assert drafted(one).digest == drafted(other).digest
    other.sampling.seed = 0
    assert drafted(one).digest != drafted(other).digest


def test_the_digest_does_not_depend_on_the_order_of_biases() -> None:
    biases = {token: float(token % 9) for token in range(300)}
    turned = dict(reversed(biases.items()))
    assert drafted(sampling(logit_bias=biases)).digest == drafted(sampling(logit_bias=turned)).digest


def test_a_valid_request_id_is_given_back() -> None:
    assert check_request_id("a b/c~1") == "a b/c~1"
