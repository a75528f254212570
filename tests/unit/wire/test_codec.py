import math
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core import frames as f
from baton.core.errors import InvalidRequest
from baton.core.ids import BlockId, Epoch, SequenceId, TicketId, WorkerId
from baton.core.request import (
    Ended,
    EndReason,
    Load,
    Request,
    Sampling,
    SequenceTokens,
    TimedPart,
    TokenLogprobs,
)
from baton.core.tickets import Geometry, Ticket
from baton.v1 import kv_pb2, link_pb2, report_pb2, worker_pb2
from baton.wire import bounds, codec, request_codec, worker_codec

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
TOKENS = st.integers(0, bounds.MAX_TOKEN_ID)
IDS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=bounds.MAX_ID_BYTES)
SEQUENCES = IDS.map(SequenceId)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)
EPOCHS = st.integers(0, bounds.MAX_EPOCH).map(Epoch)
SECONDS = st.floats(0, 1e9)


def floats32(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32)


SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.integers(1, bounds.MAX_TOKEN_ID),
    temperature=floats32(0, 1024),
    top_p=floats32(0, 1).filter(lambda p: p > 0),
    top_k=st.integers(0, bounds.MAX_TOKEN_ID),
    min_p=floats32(0, 1),
    seed=U64,
    branch=st.integers(0, 1000),
    stop_token_ids=st.frozensets(TOKENS, max_size=8),
    logprobs=st.none() | st.integers(0, 20),
    repetition_penalty=floats32(0, 2).filter(lambda penalty: penalty > 0),
    presence_penalty=floats32(-2, 2),
    frequency_penalty=floats32(-2, 2),
    logit_bias=st.dictionaries(TOKENS, floats32(-100, 100), max_size=8).map(lambda bias: tuple(sorted(bias.items()))),
    min_tokens=st.integers(0, 1),
    prompt_logprobs=st.none() | st.integers(0, 20),
)
REQUESTS = st.builds(
    Request,
    sequence_id=SEQUENCES,
    prompt=st.lists(TOKENS, min_size=1, max_size=40).map(tuple),
    sampling=SAMPLINGS,
    timeout_s=st.none() | st.integers(1, bounds.MAX_TIMEOUT_MS).map(lambda ms: ms / 1000),
    traceparent=TEXTS.filter(lambda text: len(text.encode()) <= bounds.MAX_ID_BYTES),
    salt=IDS | st.just(""),
    priority=st.integers(-100, 100),
    tenant=IDS | st.just(""),
    number=U32,
)
GEOMETRIES = st.builds(
    Geometry,
    num_layers=st.integers(1, 200),
    num_kv_heads=st.integers(1, 128),
    head_size=st.integers(1, 512),
    block_tokens=st.integers(1, 256),
    dtype=st.sampled_from(codec.DTYPES),
    fingerprint=IDS,
    first_layer=st.integers(0, 200),
    model=st.one_of(st.just(""), IDS),
)
TICKETS = st.builds(
    Ticket,
    ticket_id=IDS.map(TicketId),
    worker_id=IDS.map(WorkerId),
    epoch=EPOCHS,
    wanted=st.sets(st.integers(0, 4000), max_size=30).map(lambda wanted: tuple(sorted(wanted))),
    geometry=GEOMETRIES,
    lease_s=st.integers(0, 3_600_000).map(lambda ms: ms / 1000),
    inbox=IDS,
)
COMMANDS: st.SearchStrategy[f.Command] = st.one_of(
    REQUESTS,
    st.builds(f.Hello, router_id=IDS),
    st.builds(f.HandOver, sequence_id=SEQUENCES, ticket=TICKETS),
    st.builds(f.Release, sequence_id=SEQUENCES),
)
LOGPROBS = st.builds(
    TokenLogprobs,
    floats32(-1e6, 0),
    st.lists(st.tuples(TOKENS, floats32(-1e6, 0)), max_size=3).map(tuple),
)


@st.composite
def sequence_tokens(draw: st.DrawFn) -> SequenceTokens:
    token_ids = tuple(draw(st.lists(TOKENS, max_size=6)))
    logprobs = draw(st.sampled_from([0, len(token_ids)]))
    return SequenceTokens(
        sequence_id=draw(SEQUENCES),
        first_position=draw(U32),
        token_ids=token_ids,
        logprobs=tuple(draw(LOGPROBS) for _ in range(logprobs)),
        cached_tokens=draw(U32),
        prompt_logprobs=tuple(draw(st.lists(st.none() | LOGPROBS, max_size=3))),
    )


@st.composite
def step_tokens(draw: st.DrawFn) -> f.StepTokens:
    rows = draw(st.lists(st.tuples(st.integers(1, bounds.MAX_NUMBER), TOKENS, TOKENS), max_size=6))
    numbers, positions, token_ids = (tuple(row[column] for row in rows) for column in range(3))
    return f.StepTokens(numbers=numbers, positions=positions, token_ids=token_ids)


ENDS = st.one_of(
    st.builds(
        Ended, sequence_id=SEQUENCES, reason=st.sampled_from([r for r in EndReason if r is not EndReason.FAILED])
    ),
    st.builds(Ended, sequence_id=SEQUENCES, reason=st.just(EndReason.FAILED), error_code=IDS, error_message=TEXTS),
)
LOADS = st.builds(
    Load, running=U32, waiting=U32, waiting_tokens=U32, free_blocks=U32, total_blocks=U32, draining=st.booleans()
)
FRAMES = st.builds(
    f.WorkerFrame,
    welcome=st.none() | st.builds(f.Welcome, worker_id=IDS.map(WorkerId), epoch=EPOCHS),
    tickets=st.lists(st.builds(f.TicketGranted, sequence_id=SEQUENCES, ticket=TICKETS), max_size=2).map(tuple),
    tokens=st.lists(sequence_tokens(), max_size=3).map(tuple),
    ended=st.lists(ENDS, max_size=3).map(tuple),
    load=st.none() | LOADS,
    step=st.none() | step_tokens(),
)
HOLDERS = st.builds(
    f.Holder,
    sequence_id=SEQUENCES,
    state=IDS,
    block_ids=st.lists(st.integers(0, bounds.MAX_BLOCKS).map(BlockId), max_size=9).map(tuple),
    tokens=U32,
)
LEDGERS = st.builds(
    f.LedgerDump,
    total_blocks=U32,
    free_blocks=U32,
    cached_blocks=U32,
    held_blocks=U32,
    lent_blocks=U32,
    holders=st.lists(HOLDERS, max_size=3).map(tuple),
    violations=st.lists(TEXTS, max_size=3).map(tuple),
    transport_objects=U32,
    pinned_blocks=U32,
    unused_slots=U64,
)
STATUSES = st.builds(
    f.WorkerStatus,
    worker_id=IDS.map(WorkerId),
    epoch=EPOCHS,
    role=IDS,
    model=TEXTS,
    device=IDS,
    transport=IDS,
    geometry=GEOMETRIES,
    load=LOADS,
    steps=U64,
    uptime_s=SECONDS,
    transfer_gb_per_s=SECONDS,
    ways=st.lists(
        st.builds(f.Way, peer=IDS, transport=IDS, reason=TEXTS, probed_gb_per_s=SECONDS, stale_reads=U64), max_size=2
    ).map(tuple),
)
VALUES = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), TEXTS)
PARTS = st.builds(
    TimedPart,
    sequence_id=SEQUENCES,
    name=IDS,
    traceparent=IDS,
    start_ns=U64,
    end_ns=U64,
    attributes=st.lists(st.tuples(IDS, VALUES), max_size=3).map(tuple),
)

CARRIED = st.builds(f.Carried, transport=IDS, pieces=U64, num_bytes=U64, seconds=SECONDS)


@st.composite
def reports(draw: st.DrawFn) -> f.Report:
    steps = draw(st.lists(st.tuples(st.integers(0, bounds.MAX_TOKEN_ID), SECONDS), max_size=4))
    return f.Report(
        parts=tuple(draw(st.lists(PARTS, max_size=2))),
        batch_sizes=tuple(size for size, _ in steps),
        step_s=tuple(seconds for _, seconds in steps),
        tokens=draw(U64),
        prefill_tokens=draw(U64),
        cached_tokens=draw(U64),
        carried=tuple(draw(st.lists(CARRIED, max_size=2))),
        load=draw(LOADS),
        cached_blocks=draw(U32),
        held_blocks=draw(U32),
        lent_blocks=draw(U32),
        preempted_swap=draw(U64),
        preempted_recompute=draw(U64),
        swap_bytes=draw(U64),
        unused_slots=draw(U64),
        device_busy_s=draw(SECONDS),
        device_idle_s=draw(SECONDS),
    )


@given(st.lists(COMMANDS, max_size=4))
def test_commands_come_back_as_they_were_sent(commands: list[f.Command]) -> None:
    assert codec.commands_from_bytes(codec.commands_to_bytes(commands)) == commands


@given(FRAMES)
def test_a_frame_comes_back_as_it_was_sent(frame: f.WorkerFrame) -> None:
    assert codec.frame_from_bytes(codec.frame_to_bytes(frame)) == frame


@given(LEDGERS)
def test_a_ledger_comes_back_as_it_was_sent(dump: f.LedgerDump) -> None:
    assert worker_codec.ledger_from_bytes(worker_codec.ledger_to_bytes(dump)) == dump


@given(STATUSES)
def test_a_status_comes_back_as_it_was_sent(status: f.WorkerStatus) -> None:
    assert worker_codec.status_from_bytes(worker_codec.status_to_bytes(status)) == status


@given(reports())
def test_a_report_comes_back_as_it_was_sent(report: f.Report) -> None:
    back = worker_codec.report_from_bytes(worker_codec.report_to_bytes(report))
    assert back == report
    kinds = [[type(value) for _, value in part.attributes] for part in back.parts]
    assert kinds == [[type(value) for _, value in part.attributes] for part in report.parts]


DECODERS: list[Callable[[bytes], object]] = [
    codec.commands_from_bytes,
    codec.frame_from_bytes,
    worker_codec.ledger_from_bytes,
    worker_codec.status_from_bytes,
    worker_codec.report_from_bytes,
]
SAMPLES: list[bytes] = [
    codec.commands_to_bytes(
        [
            Request(
                sequence_id=SequenceId("r/0"),
                prompt=(1, 2, 300),
                sampling=Sampling(max_tokens=5, logprobs=2, logit_bias=((3, 1.5),), min_tokens=2),
            ),
            f.Release(sequence_id=SequenceId("r/1")),
        ]
    ),
    codec.frame_to_bytes(
        f.WorkerFrame(
            tokens=(SequenceTokens(sequence_id=SequenceId("r/0"), first_position=0, token_ids=(7,)),),
            step=f.StepTokens(numbers=(1, 300), positions=(4, 5), token_ids=(6, 70000)),
            ended=(Ended(sequence_id=SequenceId("r/0"), reason=EndReason.FAILED, error_code="Overloaded"),),
            load=Load(running=3),
        )
    ),
]


@pytest.mark.parametrize("decode", DECODERS)
@given(data=st.binary(max_size=300))
def test_random_bytes_decode_or_raise_invalid_request(decode: Callable[[bytes], object], data: bytes) -> None:
    with suppress(InvalidRequest):
        decode(data)


@pytest.mark.parametrize("decode", DECODERS)
@given(sample=st.sampled_from(SAMPLES), edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6))
def test_damaged_messages_decode_or_raise_invalid_request(
    decode: Callable[[bytes], object], sample: bytes, edits: list[tuple[int, int]]
) -> None:
    data = bytearray(sample)
    for place, value in edits:
        data[place % len(data)] = value
    with suppress(InvalidRequest):
        decode(bytes(data))


def an_admit(**changes: object) -> link_pb2.Admit:
    message = link_pb2.Admit(
        sequence_id="r/0", prompt=[1], sampling=link_pb2.Sampling(max_tokens=1, temperature=1, top_p=1)
    )
    message.MergeFrom(link_pb2.Admit(**changes))  # type: ignore[arg-type]
    return message


def a_ticket(**changes: object) -> kv_pb2.Ticket:
    message = kv_pb2.Ticket(
        ticket_id="t",
        worker_id="w",
        epoch=1,
        wanted=[0, 2],
        geometry=kv_pb2.Geometry(num_layers=1, num_kv_heads=1, head_size=8, block_tokens=16, dtype="float32"),
        inbox="i",
    )
    message.MergeFrom(kv_pb2.Ticket(**changes))  # type: ignore[arg-type]
    return message


@pytest.mark.parametrize(
    "message",
    [
        an_admit(sequence_id="x" * 201),
        an_admit(sequence_id="ä" * 101),
        an_admit(sequence_id="a\nb"),
        link_pb2.Admit(sequence_id="r", sampling=an_admit().sampling),
        an_admit(prompt=[2**31]),
        an_admit(prompt=[1] * bounds.MAX_PROMPT_TOKENS),
        an_admit(timeout_ms=2**63),
        an_admit(traceparent="x" * 201),
        an_admit(salt="x" * 201),
        an_admit(sampling=link_pb2.Sampling(temperature=math.nan)),
        an_admit(sampling=link_pb2.Sampling(temperature=math.inf)),
        an_admit(sampling=link_pb2.Sampling(temperature=-1)),
        an_admit(sampling=link_pb2.Sampling(top_p=1.5)),
        an_admit(sampling=link_pb2.Sampling(min_p=-0.5)),
        an_admit(sampling=link_pb2.Sampling(logprobs=21)),
        an_admit(sampling=link_pb2.Sampling(prompt_logprobs=21)),
        an_admit(prompt=[1] * 2**16, sampling=link_pb2.Sampling(prompt_logprobs=1)),
        an_admit(priority=101),
        an_admit(priority=-101),
        an_admit(tenant="x" * 201),
        an_admit(sampling=link_pb2.Sampling(repetition_penalty=0)),
        an_admit(sampling=link_pb2.Sampling(repetition_penalty=-1)),
        an_admit(sampling=link_pb2.Sampling(repetition_penalty=math.nan)),
        an_admit(sampling=link_pb2.Sampling(presence_penalty=math.inf)),
        an_admit(sampling=link_pb2.Sampling(presence_penalty=-2e6)),
        an_admit(sampling=link_pb2.Sampling(frequency_penalty=math.nan)),
        an_admit(sampling=link_pb2.Sampling(frequency_penalty=2e6)),
        an_admit(sampling=link_pb2.Sampling(logit_bias={1: math.nan})),
        an_admit(sampling=link_pb2.Sampling(logit_bias={1: -math.inf})),
        an_admit(sampling=link_pb2.Sampling(logit_bias={2**31: 1})),
        an_admit(sampling=link_pb2.Sampling(logit_bias=dict.fromkeys(range(bounds.MAX_LOGIT_BIASES + 1), 1))),
        an_admit(sampling=link_pb2.Sampling(min_tokens=2)),
        an_admit(sampling=link_pb2.Sampling(max_tokens=2**31)),
        an_admit(sampling=link_pb2.Sampling(stop_token_ids=[1] * (bounds.MAX_STOP_TOKENS + 1))),
        link_pb2.Admit(sequence_id="r", prompt=[1]),
    ],
)
def test_an_admit_out_of_bounds_is_refused(message: link_pb2.Admit) -> None:
    request_codec.decode_admit(an_admit())
    with pytest.raises(InvalidRequest):
        request_codec.decode_admit(message)


def test_a_router_that_knows_no_repetition_penalty_asks_for_none() -> None:
    assert request_codec.decode_admit(an_admit()).sampling.repetition_penalty == 1.0


@pytest.mark.parametrize(
    "message",
    [
        a_ticket(ticket_id="x" * 201),
        a_ticket(worker_id="x" * 201),
        a_ticket(epoch=2**63),
        a_ticket(wanted=[2]),
        a_ticket(wanted=[1]),
        a_ticket(wanted=[2**32 - 1]),
        a_ticket(lease_ms=2**32 - 1),
        a_ticket(inbox="a\0"),
        a_ticket(geometry=kv_pb2.Geometry(dtype="int4")),
        a_ticket(geometry=kv_pb2.Geometry(num_layers=2**20)),
        a_ticket(geometry=kv_pb2.Geometry(first_layer=2**20)),
        a_ticket(geometry=kv_pb2.Geometry(model="m" * 1000)),
        kv_pb2.Ticket(ticket_id="t", worker_id="w", inbox="i"),
    ],
)
def test_a_ticket_out_of_bounds_is_refused(message: kv_pb2.Ticket) -> None:
    codec.decode_ticket(a_ticket())
    with pytest.raises(InvalidRequest):
        codec.decode_ticket(message)


@pytest.mark.parametrize(
    "message",
    [
        link_pb2.ConnectResponse(welcome=link_pb2.Welcome(epoch=1)),
        link_pb2.ConnectResponse(tokens=[link_pb2.SequenceTokens(token_ids=[1])]),
        link_pb2.ConnectResponse(ended=[link_pb2.Ended(sequence_id="r/0")]),
        link_pb2.ConnectResponse(ended=[link_pb2.Ended(sequence_id="r/0", reason=99)]),  # type: ignore[arg-type]
        link_pb2.ConnectResponse(
            tokens=[link_pb2.SequenceTokens(sequence_id="r/0", token_ids=[1, 2], logprobs=[{"logprob": -1}])]
        ),
        link_pb2.ConnectResponse(
            tokens=[link_pb2.SequenceTokens(sequence_id="r/0", token_ids=[1], logprobs=[{"logprob": math.nan}])]
        ),
        link_pb2.ConnectResponse(
            tokens=[
                link_pb2.SequenceTokens(
                    sequence_id="r/0", token_ids=[1], logprobs=[{"top": [{"token_id": i} for i in range(21)]}]
                )
            ]
        ),
        link_pb2.ConnectResponse(tokens=[link_pb2.SequenceTokens(sequence_id="r")] * (bounds.MAX_ITEMS + 1)),
        link_pb2.ConnectResponse(
            tokens=[link_pb2.SequenceTokens(sequence_id="r/0", prompt_logprobs=[{"logprob": math.nan}])]
        ),
        link_pb2.ConnectResponse(step=link_pb2.StepTokens(numbers=[1, 2], positions=[1], token_ids=[1, 2])),
        link_pb2.ConnectResponse(step=link_pb2.StepTokens(numbers=[1], positions=[1], token_ids=[1, 2])),
        link_pb2.ConnectResponse(step=link_pb2.StepTokens(numbers=[0], positions=[1], token_ids=[1])),
        link_pb2.ConnectResponse(step=link_pb2.StepTokens(numbers=[1], positions=[2**31], token_ids=[1])),
        link_pb2.ConnectResponse(step=link_pb2.StepTokens(numbers=[1], positions=[1], token_ids=[2**31])),
        link_pb2.ConnectResponse(
            step=link_pb2.StepTokens(
                numbers=[1] * (bounds.MAX_ITEMS + 1),
                positions=[1] * (bounds.MAX_ITEMS + 1),
                token_ids=[1] * (bounds.MAX_ITEMS + 1),
            )
        ),
    ],
)
def test_a_frame_out_of_bounds_is_refused(message: link_pb2.ConnectResponse) -> None:
    with pytest.raises(InvalidRequest):
        codec.decode_frame(message)


def test_an_empty_command_and_too_many_commands_are_refused() -> None:
    for commands in ([link_pb2.Command()], [link_pb2.Command(release={"sequence_id": "r"})] * (codec.MAX_COMMANDS + 1)):
        with pytest.raises(InvalidRequest):
            codec.decode_commands(link_pb2.ConnectRequest(commands=commands))


@pytest.mark.parametrize(
    "data",
    [
        report_pb2.Report(batch_sizes=[1, 2], step_s=[0.1]).SerializeToString(),
        report_pb2.Report(batch_sizes=[1], step_s=[math.nan]).SerializeToString(),
        report_pb2.Report(device_idle_s=math.inf).SerializeToString(),
        report_pb2.Report(carried=[report_pb2.Carried(transport="t", seconds=-1)]).SerializeToString(),
        report_pb2.Report(parts=[{"sequence_id": "s", "name": "n", "attributes": [{"key": "k"}]}]).SerializeToString(),
        b"\xff" * 8,
    ],
)
def test_a_report_out_of_bounds_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        worker_codec.report_from_bytes(data)


def test_a_ledger_or_status_out_of_bounds_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        worker_codec.decode_ledger(worker_pb2.GetLedgerResponse(violations=["x" * 5000]))
    with pytest.raises(InvalidRequest):
        worker_codec.decode_status(worker_pb2.GetStatusResponse(worker_id="w", uptime_s=math.inf))


@pytest.mark.parametrize("milliseconds", [0, 1, 2007, 524_287, 3_600_000])
def test_milliseconds_do_not_grow_on_the_way(milliseconds: int) -> None:
    ticket = replace(codec.decode_ticket(a_ticket()), lease_s=milliseconds / 1000)
    assert codec.encode_ticket(ticket).lease_ms == milliseconds


def test_a_deadline_that_has_nearly_passed_is_still_a_deadline() -> None:
    request = Request(sequence_id=SequenceId("r/0"), prompt=(1,), sampling=Sampling(max_tokens=1), timeout_s=0.0)
    assert request_codec.decode_admit(request_codec.encode_request(request)).timeout_s == 0.001


def test_a_failure_with_a_long_message_crosses_shortened() -> None:
    ended = Ended(
        sequence_id=SequenceId("r/0"), reason=EndReason.FAILED, error_code="Unavailable", error_message="ä" * 5000
    )
    message = codec.decode_ended(codec.encode_ended(ended)).error_message
    assert message == "ä" * (bounds.MAX_TEXT_BYTES // 2)


def test_an_invalid_request_never_quotes_what_was_sent() -> None:
    secret = "secret" * 100
    with pytest.raises(InvalidRequest) as caught:
        request_codec.decode_admit(an_admit(sequence_id=secret))
    assert "secret" not in str(caught.value)
    with pytest.raises(InvalidRequest) as caught:
        codec.commands_from_bytes(struct.pack("<I", 0xFFFFFFFF) + b"secret")
    assert "secret" not in str(caught.value)
