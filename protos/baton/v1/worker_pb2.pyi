from baton.v1 import kv_pb2 as _kv_pb2
from baton.v1 import link_pb2 as _link_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetLedgerRequest(_message.Message):
    __slots__ = ("drop_cached",)
    DROP_CACHED_FIELD_NUMBER: _ClassVar[int]
    drop_cached: bool
    def __init__(self, drop_cached: _Optional[bool] = ...) -> None: ...

class GetLedgerResponse(_message.Message):
    __slots__ = ("total_blocks", "free_blocks", "cached_blocks", "held_blocks", "lent_blocks", "holders", "violations", "transport_objects", "pinned_blocks", "unused_slots")
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LENT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    VIOLATIONS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_OBJECTS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    UNUSED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    held_blocks: int
    lent_blocks: int
    holders: _containers.RepeatedCompositeFieldContainer[Holder]
    violations: _containers.RepeatedScalarFieldContainer[str]
    transport_objects: int
    pinned_blocks: int
    unused_slots: int
    def __init__(self, total_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., held_blocks: _Optional[int] = ..., lent_blocks: _Optional[int] = ..., holders: _Optional[_Iterable[_Union[Holder, _Mapping]]] = ..., violations: _Optional[_Iterable[str]] = ..., transport_objects: _Optional[int] = ..., pinned_blocks: _Optional[int] = ..., unused_slots: _Optional[int] = ...) -> None: ...

class Holder(_message.Message):
    __slots__ = ("sequence_id", "state", "block_ids", "tokens")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: str
    state: str
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    tokens: int
    def __init__(self, sequence_id: _Optional[str] = ..., state: _Optional[str] = ..., block_ids: _Optional[_Iterable[int]] = ..., tokens: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_ms",)
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    timeout_ms: int
    def __init__(self, timeout_ms: _Optional[int] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("drained", "remaining")
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    drained: bool
    remaining: int
    def __init__(self, drained: _Optional[bool] = ..., remaining: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("worker_id", "epoch", "role", "model", "device", "transport", "geometry", "load", "steps", "uptime_s", "transfer_gb_per_s", "ways")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_GB_PER_S_FIELD_NUMBER: _ClassVar[int]
    WAYS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    role: str
    model: str
    device: str
    transport: str
    geometry: _kv_pb2.Geometry
    load: _link_pb2.Load
    steps: int
    uptime_s: float
    transfer_gb_per_s: float
    ways: _containers.RepeatedCompositeFieldContainer[Way]
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., role: _Optional[str] = ..., model: _Optional[str] = ..., device: _Optional[str] = ..., transport: _Optional[str] = ..., geometry: _Optional[_Union[_kv_pb2.Geometry, _Mapping]] = ..., load: _Optional[_Union[_link_pb2.Load, _Mapping]] = ..., steps: _Optional[int] = ..., uptime_s: _Optional[float] = ..., transfer_gb_per_s: _Optional[float] = ..., ways: _Optional[_Iterable[_Union[Way, _Mapping]]] = ...) -> None: ...

class Way(_message.Message):
    __slots__ = ("peer", "transport", "reason", "probed_gb_per_s", "stale_reads")
    PEER_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PROBED_GB_PER_S_FIELD_NUMBER: _ClassVar[int]
    STALE_READS_FIELD_NUMBER: _ClassVar[int]
    peer: str
    transport: str
    reason: str
    probed_gb_per_s: float
    stale_reads: int
    def __init__(self, peer: _Optional[str] = ..., transport: _Optional[str] = ..., reason: _Optional[str] = ..., probed_gb_per_s: _Optional[float] = ..., stale_reads: _Optional[int] = ...) -> None: ...
