"""Protobuf <-> core for what a worker tells of itself: its ledger, its status, and its step loop's reports.

As in `codec.py`; ledgers and statuses go to operators and through the ring, reports through the ring alone.
"""

from ..core import frames as f
from ..core.errors import InvalidRequest
from ..core.ids import BlockId, WorkerId
from ..core.request import TimedPart
from ..v1 import report_pb2, worker_pb2
from . import bounds
from .codec import decode_epoch, decode_geometry, decode_load, encode_geometry, encode_load, parse
from .request_codec import decode_sequence_id

# What operators ask


def encode_ledger(dump: f.LedgerDump) -> worker_pb2.GetLedgerResponse:
    return worker_pb2.GetLedgerResponse(
        total_blocks=dump.total_blocks,
        free_blocks=dump.free_blocks,
        cached_blocks=dump.cached_blocks,
        held_blocks=dump.held_blocks,
        lent_blocks=dump.lent_blocks,
        holders=[
            worker_pb2.Holder(
                sequence_id=holder.sequence_id, state=holder.state, block_ids=holder.block_ids, tokens=holder.tokens
            )
            for holder in dump.holders
        ],
        violations=dump.violations,
        transport_objects=dump.transport_objects,
        pinned_blocks=dump.pinned_blocks,
        unused_slots=dump.unused_slots,
    )


def decode_ledger(message: worker_pb2.GetLedgerResponse) -> f.LedgerDump:
    bounds.count(message.holders, "holders")
    bounds.count(message.violations, "violations")
    return f.LedgerDump(
        total_blocks=message.total_blocks,
        free_blocks=message.free_blocks,
        cached_blocks=message.cached_blocks,
        held_blocks=message.held_blocks,
        lent_blocks=message.lent_blocks,
        holders=tuple(_holder(holder) for holder in message.holders),
        violations=tuple(bounds.text(violation, "violations") for violation in message.violations),
        transport_objects=message.transport_objects,
        pinned_blocks=message.pinned_blocks,
        unused_slots=message.unused_slots,
    )


def _holder(message: worker_pb2.Holder) -> f.Holder:
    blocks = bounds.integers(message.block_ids, "block_ids", bounds.MAX_PROMPT_TOKENS, bounds.MAX_BLOCKS)
    return f.Holder(
        sequence_id=decode_sequence_id(message.sequence_id),
        state=bounds.text(message.state, "state", bounds.MAX_ID_BYTES),
        block_ids=tuple(BlockId(block) for block in blocks),
        tokens=message.tokens,
    )


def ledger_to_bytes(dump: f.LedgerDump) -> bytes:
    return encode_ledger(dump).SerializeToString()


def ledger_from_bytes(data: bytes) -> f.LedgerDump:
    return decode_ledger(parse(worker_pb2.GetLedgerResponse, data))


def encode_status(status: f.WorkerStatus) -> worker_pb2.GetStatusResponse:
    return worker_pb2.GetStatusResponse(
        worker_id=status.worker_id,
        epoch=status.epoch,
        role=status.role,
        model=status.model,
        device=status.device,
        transport=status.transport,
        geometry=encode_geometry(status.geometry),
        load=encode_load(status.load),
        steps=status.steps,
        uptime_s=status.uptime_s,
        transfer_gb_per_s=status.transfer_gb_per_s,
        ways=[
            worker_pb2.Way(
                peer=way.peer,
                transport=way.transport,
                reason=way.reason,
                probed_gb_per_s=way.probed_gb_per_s,
                stale_reads=way.stale_reads,
            )
            for way in status.ways
        ],
    )


def decode_status(message: worker_pb2.GetStatusResponse) -> f.WorkerStatus:
    bounds.count(message.ways, "ways")
    return f.WorkerStatus(
        worker_id=WorkerId(bounds.identifier(message.worker_id, "worker_id")),
        epoch=decode_epoch(message.epoch),
        role=bounds.text(message.role, "role", bounds.MAX_ID_BYTES),
        model=bounds.text(message.model, "model"),
        device=bounds.text(message.device, "device", bounds.MAX_ID_BYTES),
        transport=bounds.text(message.transport, "transport", bounds.MAX_ID_BYTES),
        geometry=decode_geometry(message.geometry),
        load=decode_load(message.load),
        steps=message.steps,
        uptime_s=bounds.number(message.uptime_s, "uptime_s"),
        transfer_gb_per_s=bounds.number(message.transfer_gb_per_s, "transfer_gb_per_s"),
        ways=tuple(_way(way) for way in message.ways),
    )


def _way(message: worker_pb2.Way) -> f.Way:
    return f.Way(
        peer=bounds.identifier(message.peer, "peer"),
        transport=bounds.text(message.transport, "transport", bounds.MAX_ID_BYTES),
        reason=bounds.text(message.reason, "reason"),
        probed_gb_per_s=bounds.number(message.probed_gb_per_s, "probed_gb_per_s"),
        stale_reads=message.stale_reads,
    )


def status_to_bytes(status: f.WorkerStatus) -> bytes:
    return encode_status(status).SerializeToString()


def status_from_bytes(data: bytes) -> f.WorkerStatus:
    return decode_status(parse(worker_pb2.GetStatusResponse, data))


# Step loop -> service


def report_to_bytes(report: f.Report) -> bytes:
    return report_pb2.Report(
        parts=[_encode_part(part) for part in report.parts],
        batch_sizes=report.batch_sizes,
        step_s=report.step_s,
        tokens=report.tokens,
        prefill_tokens=report.prefill_tokens,
        cached_tokens=report.cached_tokens,
        carried=[
            report_pb2.Carried(transport=one.transport, pieces=one.pieces, bytes=one.num_bytes, seconds=one.seconds)
            for one in report.carried
        ],
        load=encode_load(report.load),
        cached_blocks=report.cached_blocks,
        held_blocks=report.held_blocks,
        lent_blocks=report.lent_blocks,
        preempted_swap=report.preempted_swap,
        preempted_recompute=report.preempted_recompute,
        swap_bytes=report.swap_bytes,
        unused_slots=report.unused_slots,
        device_busy_s=report.device_busy_s,
        device_idle_s=report.device_idle_s,
    ).SerializeToString()


def report_from_bytes(data: bytes) -> f.Report:
    message = parse(report_pb2.Report, data)
    bounds.count(message.parts, "parts")
    bounds.count(message.step_s, "step_s")
    bounds.count(message.carried, "carried")
    if len(message.batch_sizes) != len(message.step_s):
        raise InvalidRequest("batch_sizes and step_s must be as many")
    return f.Report(
        parts=tuple(_decode_part(part) for part in message.parts),
        batch_sizes=bounds.integers(message.batch_sizes, "batch_sizes"),
        step_s=tuple(bounds.number(seconds, "step_s") for seconds in message.step_s),
        tokens=message.tokens,
        prefill_tokens=message.prefill_tokens,
        cached_tokens=message.cached_tokens,
        carried=tuple(_decode_carried(one) for one in message.carried),
        load=decode_load(message.load),
        cached_blocks=message.cached_blocks,
        held_blocks=message.held_blocks,
        lent_blocks=message.lent_blocks,
        preempted_swap=message.preempted_swap,
        preempted_recompute=message.preempted_recompute,
        swap_bytes=message.swap_bytes,
        unused_slots=message.unused_slots,
        device_busy_s=bounds.number(message.device_busy_s, "device_busy_s"),
        device_idle_s=bounds.number(message.device_idle_s, "device_idle_s"),
    )


def _decode_carried(message: report_pb2.Carried) -> f.Carried:
    return f.Carried(
        transport=bounds.identifier(message.transport, "transport"),
        pieces=message.pieces,
        num_bytes=message.bytes,
        seconds=bounds.number(message.seconds, "seconds"),
    )


def _encode_part(part: TimedPart) -> report_pb2.TimedPart:
    return report_pb2.TimedPart(
        sequence_id=part.sequence_id,
        name=part.name,
        traceparent=part.traceparent,
        start_ns=part.start_ns,
        end_ns=part.end_ns,
        attributes=[_encode_attribute(key, value) for key, value in part.attributes],
    )


def _encode_attribute(key: str, value: str | int | float | bool) -> report_pb2.Attribute:
    match value:
        case bool():  # before int, of which it is a kind
            return report_pb2.Attribute(key=key, flag=value)
        case int():
            return report_pb2.Attribute(key=key, integer=value)
        case float():
            return report_pb2.Attribute(key=key, number=value)
        case str():
            return report_pb2.Attribute(key=key, text=value)


def _decode_part(message: report_pb2.TimedPart) -> TimedPart:
    bounds.count(message.attributes, "attributes")
    return TimedPart(
        sequence_id=decode_sequence_id(message.sequence_id),
        name=bounds.identifier(message.name, "name"),
        traceparent=bounds.text(message.traceparent, "traceparent", bounds.MAX_ID_BYTES),
        start_ns=message.start_ns,
        end_ns=message.end_ns,
        attributes=tuple(_decode_attribute(attribute) for attribute in message.attributes),
    )


def _decode_attribute(message: report_pb2.Attribute) -> tuple[str, str | int | float | bool]:
    key = bounds.identifier(message.key, "attribute")
    match message.WhichOneof("value"):
        case "flag":
            return key, message.flag
        case "integer":
            return key, message.integer
        case "number":
            return key, message.number
        case "text":
            return key, bounds.text(message.text, "attribute")
        case _:
            raise InvalidRequest("an attribute has no value")
