from baton.v1 import link_pb2 as _link_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Report(_message.Message):
    __slots__ = ("parts", "batch_sizes", "step_s", "tokens", "prefill_tokens", "cached_tokens", "load", "cached_blocks", "held_blocks", "lent_blocks", "preempted_swap", "preempted_recompute", "swap_bytes", "unused_slots", "carried", "device_busy_s", "device_idle_s")
    PARTS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZES_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LENT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTED_SWAP_FIELD_NUMBER: _ClassVar[int]
    PREEMPTED_RECOMPUTE_FIELD_NUMBER: _ClassVar[int]
    SWAP_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNUSED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    CARRIED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BUSY_S_FIELD_NUMBER: _ClassVar[int]
    DEVICE_IDLE_S_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedCompositeFieldContainer[TimedPart]
    batch_sizes: _containers.RepeatedScalarFieldContainer[int]
    step_s: _containers.RepeatedScalarFieldContainer[float]
    tokens: int
    prefill_tokens: int
    cached_tokens: int
    load: _link_pb2.Load
    cached_blocks: int
    held_blocks: int
    lent_blocks: int
    preempted_swap: int
    preempted_recompute: int
    swap_bytes: int
    unused_slots: int
    carried: _containers.RepeatedCompositeFieldContainer[Carried]
    device_busy_s: float
    device_idle_s: float
    def __init__(self, parts: _Optional[_Iterable[_Union[TimedPart, _Mapping]]] = ..., batch_sizes: _Optional[_Iterable[int]] = ..., step_s: _Optional[_Iterable[float]] = ..., tokens: _Optional[int] = ..., prefill_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., load: _Optional[_Union[_link_pb2.Load, _Mapping]] = ..., cached_blocks: _Optional[int] = ..., held_blocks: _Optional[int] = ..., lent_blocks: _Optional[int] = ..., preempted_swap: _Optional[int] = ..., preempted_recompute: _Optional[int] = ..., swap_bytes: _Optional[int] = ..., unused_slots: _Optional[int] = ..., carried: _Optional[_Iterable[_Union[Carried, _Mapping]]] = ..., device_busy_s: _Optional[float] = ..., device_idle_s: _Optional[float] = ...) -> None: ...

class Carried(_message.Message):
    __slots__ = ("transport", "pieces", "bytes", "seconds")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    transport: str
    pieces: int
    bytes: int
    seconds: float
    def __init__(self, transport: _Optional[str] = ..., pieces: _Optional[int] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class TimedPart(_message.Message):
    __slots__ = ("sequence_id", "name", "traceparent", "start_ns", "end_ns", "attributes")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    START_NS_FIELD_NUMBER: _ClassVar[int]
    END_NS_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    name: str
    traceparent: str
    start_ns: int
    end_ns: int
    attributes: _containers.RepeatedCompositeFieldContainer[Attribute]
    def __init__(self, sequence_id: _Optional[str] = ..., name: _Optional[str] = ..., traceparent: _Optional[str] = ..., start_ns: _Optional[int] = ..., end_ns: _Optional[int] = ..., attributes: _Optional[_Iterable[_Union[Attribute, _Mapping]]] = ...) -> None: ...

class Attribute(_message.Message):
    __slots__ = ("key", "text", "integer", "number", "flag")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    key: str
    text: str
    integer: int
    number: float
    flag: bool
    def __init__(self, key: _Optional[str] = ..., text: _Optional[str] = ..., integer: _Optional[int] = ..., number: _Optional[float] = ..., flag: _Optional[bool] = ...) -> None: ...
