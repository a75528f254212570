from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Geometry(_message.Message):
    __slots__ = ("num_layers", "num_kv_heads", "head_size", "block_tokens", "dtype", "fingerprint", "first_layer", "model")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_kv_heads: int
    head_size: int
    block_tokens: int
    dtype: str
    fingerprint: str
    first_layer: int
    model: str
    def __init__(self, num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_size: _Optional[int] = ..., block_tokens: _Optional[int] = ..., dtype: _Optional[str] = ..., fingerprint: _Optional[str] = ..., first_layer: _Optional[int] = ..., model: _Optional[str] = ...) -> None: ...

class Ticket(_message.Message):
    __slots__ = ("ticket_id", "worker_id", "epoch", "wanted", "geometry", "lease_ms", "inbox")
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    INBOX_FIELD_NUMBER: _ClassVar[int]
    ticket_id: str
    worker_id: str
    epoch: int
    wanted: _containers.RepeatedScalarFieldContainer[int]
    geometry: Geometry
    lease_ms: int
    inbox: str
    def __init__(self, ticket_id: _Optional[str] = ..., worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., wanted: _Optional[_Iterable[int]] = ..., geometry: _Optional[_Union[Geometry, _Mapping]] = ..., lease_ms: _Optional[int] = ..., inbox: _Optional[str] = ...) -> None: ...
