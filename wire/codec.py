"""Protobuf <-> core, both ways, for links and the baton. `request_codec.py` has what stands in `Admit`,
`worker_codec.py` what a worker tells of itself.

`encode_x` gives a message, `decode_x` takes one and raises InvalidRequest for anything outside its bounds. `x_to_bytes`
and `x_from_bytes` do the same for the shared-memory ring between a worker's service and its step loop.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from ..core import frames as f
from ..core.errors import InvalidRequest
from ..core.ids import Epoch, TicketId, WorkerId
from ..core.request import (
    MAX_LOGPROBS,
    MAX_PROMPT_LOGPROBS,
    Ended,
    EndReason,
    Load,
    PromptLogprob,
    Request,
    SequenceTokens,
    TokenLogprobs,
)
from ..core.tickets import Geometry, Ticket
from ..v1 import inference_pb2, kv_pb2, link_pb2
from . import bounds
from .request_codec import decode_admit, decode_sequence_id, encode_request, milliseconds

DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn")
MAX_COMMANDS = 8192  # in one frame
_MAX_LEASE_MS = 3_600_000
_END_REASONS = {
    EndReason.STOP: link_pb2.END_REASON_STOP,
    EndReason.LENGTH: link_pb2.END_REASON_LENGTH,
    EndReason.RELEASED: link_pb2.END_REASON_RELEASED,
    EndReason.HANDED_OVER: link_pb2.END_REASON_HANDED_OVER,
    EndReason.FAILED: link_pb2.END_REASON_FAILED,
}
_END_REASON_OF = {number: reason for reason, number in _END_REASONS.items()}

M = TypeVar("M", bound=Message)


def parse(kind: type[M], data: bytes) -> M:
    """A message of `kind` from its bytes. Raises InvalidRequest when they are none."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise InvalidRequest(f"the bytes are no {kind.DESCRIPTOR.name}") from None


def decode_epoch(value: int) -> Epoch:
    return Epoch(bounds.at_most(value, bounds.MAX_EPOCH, "epoch"))


# The baton


def encode_geometry(geometry: Geometry) -> kv_pb2.Geometry:
    return kv_pb2.Geometry(
        num_layers=geometry.num_layers,
        num_kv_heads=geometry.num_kv_heads,
        head_size=geometry.head_size,
        block_tokens=geometry.block_tokens,
        dtype=geometry.dtype,
        fingerprint=geometry.fingerprint,
        first_layer=geometry.first_layer,
        model=geometry.model,
    )


def decode_geometry(message: kv_pb2.Geometry) -> Geometry:
    if message.dtype not in DTYPES:
        raise InvalidRequest(f"dtype must be one of {', '.join(DTYPES)}")
    return Geometry(
        num_layers=bounds.at_most(message.num_layers, bounds.MAX_ITEMS, "num_layers", least=1),
        num_kv_heads=bounds.at_most(message.num_kv_heads, bounds.MAX_ITEMS, "num_kv_heads", least=1),
        head_size=bounds.at_most(message.head_size, bounds.MAX_ITEMS, "head_size", least=1),
        block_tokens=bounds.at_most(message.block_tokens, bounds.MAX_ITEMS, "block_tokens", least=1),
        dtype=message.dtype,
        fingerprint=bounds.text(message.fingerprint, "fingerprint", bounds.MAX_ID_BYTES),
        first_layer=bounds.at_most(message.first_layer, bounds.MAX_ITEMS, "first_layer"),
        model=bounds.text(message.model, "model", bounds.MAX_ID_BYTES),
    )


def encode_ticket(ticket: Ticket) -> kv_pb2.Ticket:
    return kv_pb2.Ticket(
        ticket_id=ticket.ticket_id,
        worker_id=ticket.worker_id,
        epoch=ticket.epoch,
        wanted=ticket.wanted,
        geometry=encode_geometry(ticket.geometry),
        lease_ms=min(milliseconds(ticket.lease_s), _MAX_LEASE_MS),
        inbox=ticket.inbox,
    )


def decode_ticket(message: kv_pb2.Ticket) -> Ticket:
    return Ticket(
        ticket_id=TicketId(bounds.identifier(message.ticket_id, "ticket_id")),
        worker_id=WorkerId(bounds.identifier(message.worker_id, "worker_id")),
        epoch=decode_epoch(message.epoch),
        wanted=bounds.rising(message.wanted, "wanted", bounds.MAX_PROMPT_TOKENS, bounds.MAX_BLOCKS),
        geometry=decode_geometry(message.geometry),
        lease_s=bounds.at_most(message.lease_ms, _MAX_LEASE_MS, "lease_ms") / 1000,
        inbox=bounds.identifier(message.inbox, "inbox"),
    )


# Router -> worker


def encode_command(command: f.Command) -> link_pb2.Command:
    match command:
        case Request():
            return link_pb2.Command(admit=encode_request(command))
        case f.Release(sequence_id=sequence_id):
            return link_pb2.Command(release=link_pb2.Release(sequence_id=sequence_id))
        case f.HandOver(sequence_id=sequence_id, ticket=ticket):
            return link_pb2.Command(hand_over=link_pb2.HandOver(sequence_id=sequence_id, ticket=encode_ticket(ticket)))
        case f.Hello(router_id=router_id):
            return link_pb2.Command(hello=link_pb2.Hello(router_id=router_id))


def decode_command(message: link_pb2.Command) -> f.Command:
    match message.WhichOneof("command"):
        case "admit":
            return decode_admit(message.admit)
        case "release":
            return f.Release(sequence_id=decode_sequence_id(message.release.sequence_id))
        case "hand_over":
            hand_over = message.hand_over
            return f.HandOver(
                sequence_id=decode_sequence_id(hand_over.sequence_id), ticket=decode_ticket(hand_over.ticket)
            )
        case "hello":
            return f.Hello(router_id=bounds.identifier(message.hello.router_id, "router_id"))
        case _:
            raise InvalidRequest("a command is empty, or newer than this worker")


def encode_commands(commands: Iterable[f.Command]) -> link_pb2.ConnectRequest:
    return link_pb2.ConnectRequest(commands=[encode_command(command) for command in commands])


def decode_commands(message: link_pb2.ConnectRequest) -> list[f.Command]:
    bounds.count(message.commands, "commands", MAX_COMMANDS)
    return [decode_command(command) for command in message.commands]


def commands_to_bytes(commands: Iterable[f.Command]) -> bytes:
    return encode_commands(commands).SerializeToString()


def commands_from_bytes(data: bytes) -> list[f.Command]:
    return decode_commands(parse(link_pb2.ConnectRequest, data))


# Worker -> router


def encode_logprobs(logprobs: Sequence[TokenLogprobs]) -> list[inference_pb2.TokenLogprobs]:
    return [
        inference_pb2.TokenLogprobs(
            logprob=entry.logprob,
            top=[inference_pb2.TopLogprob(token_id=token, logprob=logprob) for token, logprob in entry.top],
        )
        for entry in logprobs
    ]


def decode_logprobs(messages: Sequence[inference_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    bounds.count(messages, "logprobs")
    return tuple(_decode_logprob(message) for message in messages)


def _decode_logprob(message: inference_pb2.TokenLogprobs | inference_pb2.PromptLogprob) -> TokenLogprobs:
    bounds.count(message.top, "top logprobs", MAX_LOGPROBS)
    if math.isnan(message.logprob) or any(math.isnan(top.logprob) for top in message.top):
        raise InvalidRequest("a logprob is not a number")
    return TokenLogprobs(message.logprob, tuple((top.token_id, top.logprob) for top in message.top))


def encode_prompt_logprobs(prompt: Iterable[PromptLogprob]) -> list[inference_pb2.PromptLogprob]:
    return [
        inference_pb2.PromptLogprob(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=[inference_pb2.TopLogprob(token_id=token, logprob=logprob) for token, logprob in entry.top],
        )
        for entry in prompt
    ]


def _add_tokens(frame: link_pb2.ConnectResponse, tokens: SequenceTokens) -> None:
    added = frame.tokens.add(
        sequence_id=tokens.sequence_id,
        first_position=tokens.first_position,
        token_ids=tokens.token_ids,
        logprobs=encode_logprobs(tokens.logprobs) if tokens.logprobs else None,
        cached_tokens=tokens.cached_tokens,
    )
    for entry in tokens.prompt_logprobs:
        at = added.prompt_logprobs.add(logprob=None if entry is None else entry.logprob)
        for token, logprob in () if entry is None else entry.top:
            at.top.add(token_id=token, logprob=logprob)


def decode_tokens(message: link_pb2.SequenceTokens) -> SequenceTokens:
    token_ids = bounds.integers(message.token_ids, "token_ids")
    if message.logprobs and len(message.logprobs) != len(token_ids):
        raise InvalidRequest("logprobs must be one per token, or none")
    bounds.count(message.prompt_logprobs, "prompt_logprobs", MAX_PROMPT_LOGPROBS)
    return SequenceTokens(
        sequence_id=decode_sequence_id(message.sequence_id),
        first_position=message.first_position,
        token_ids=token_ids,
        logprobs=decode_logprobs(message.logprobs) if message.logprobs else (),
        cached_tokens=message.cached_tokens,
        prompt_logprobs=tuple(
            _decode_logprob(entry) if entry.HasField("logprob") else None for entry in message.prompt_logprobs
        ),
    )


def encode_step(step: f.StepTokens) -> link_pb2.StepTokens:
    return link_pb2.StepTokens(numbers=step.numbers, positions=step.positions, token_ids=step.token_ids)


def decode_step(message: link_pb2.StepTokens) -> f.StepTokens:
    numbers = bounds.integers(message.numbers, "numbers", high=bounds.MAX_NUMBER)
    if len(message.positions) != len(numbers) or len(message.token_ids) != len(numbers):
        raise InvalidRequest("numbers, positions and token_ids must be as many")
    if 0 in numbers:
        raise InvalidRequest("numbers must hold no 0")
    return f.StepTokens(
        numbers=numbers,
        positions=bounds.integers(message.positions, "positions"),
        token_ids=bounds.integers(message.token_ids, "token_ids"),
    )


def encode_ended(ended: Ended) -> link_pb2.Ended:
    failure = None
    if ended.reason is EndReason.FAILED:
        # A message never fails to cross for being long; a cut inside a character loses that character.
        message = ended.error_message.encode()[: bounds.MAX_TEXT_BYTES].decode(errors="ignore")
        failure = link_pb2.Failure(code=ended.error_code, message=message)
    return link_pb2.Ended(sequence_id=ended.sequence_id, reason=_END_REASONS[ended.reason], failure=failure)


def decode_ended(message: link_pb2.Ended) -> Ended:
    reason = _END_REASON_OF.get(message.reason)
    if reason is None:
        raise InvalidRequest("the reason of an end is missing, or newer than this reader")
    return Ended(
        sequence_id=decode_sequence_id(message.sequence_id),
        reason=reason,
        error_code=bounds.text(message.failure.code, "failure.code", bounds.MAX_ID_BYTES),
        error_message=bounds.text(message.failure.message, "failure.message"),
    )


def encode_load(load: Load) -> link_pb2.Load:
    return link_pb2.Load(
        running=load.running,
        waiting=load.waiting,
        waiting_tokens=load.waiting_tokens,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
        draining=load.draining,
    )


def decode_load(message: link_pb2.Load) -> Load:
    return Load(
        running=message.running,
        waiting=message.waiting,
        waiting_tokens=message.waiting_tokens,
        free_blocks=message.free_blocks,
        total_blocks=message.total_blocks,
        draining=message.draining,
    )


def encode_frame(frame: f.WorkerFrame) -> link_pb2.ConnectResponse:
    welcome, step = frame.welcome, frame.step
    message = link_pb2.ConnectResponse(
        welcome=None if welcome is None else link_pb2.Welcome(worker_id=welcome.worker_id, epoch=welcome.epoch),
        tickets=[
            link_pb2.TicketGranted(sequence_id=granted.sequence_id, ticket=encode_ticket(granted.ticket))
            for granted in frame.tickets
        ],
        ended=[encode_ended(ended) for ended in frame.ended],
        load=None if frame.load is None else encode_load(frame.load),
        step=None if step is None else encode_step(step),
    )
    for tokens in frame.tokens:  # in place: a list of messages would be copied, and this runs every step
        _add_tokens(message, tokens)
    return message


def decode_frame(message: link_pb2.ConnectResponse) -> f.WorkerFrame:
    for field, items in (("tickets", message.tickets), ("tokens", message.tokens), ("ended", message.ended)):
        bounds.count(items, field)
    welcome = None
    if message.HasField("welcome"):
        worker_id = WorkerId(bounds.identifier(message.welcome.worker_id, "worker_id"))
        welcome = f.Welcome(worker_id=worker_id, epoch=decode_epoch(message.welcome.epoch))
    return f.WorkerFrame(
        welcome=welcome,
        tickets=tuple(
            f.TicketGranted(sequence_id=decode_sequence_id(granted.sequence_id), ticket=decode_ticket(granted.ticket))
            for granted in message.tickets
        ),
        tokens=tuple(decode_tokens(tokens) for tokens in message.tokens),
        ended=tuple(decode_ended(ended) for ended in message.ended),
        load=decode_load(message.load) if message.HasField("load") else None,
        step=decode_step(message.step) if message.HasField("step") else None,
    )


def frame_to_bytes(frame: f.WorkerFrame) -> bytes:
    return encode_frame(frame).SerializeToString()


def frame_from_bytes(data: bytes) -> f.WorkerFrame:
    return decode_frame(parse(link_pb2.ConnectResponse, data))
