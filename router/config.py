"""The router's configuration, and how one is started.

    BATON_ROUTER_CONFIG='{"model_dir": "/models/m", "model_name": "m", "redis_url": "redis://...", ...}' \
        python -m baton.router

The variable holds one JSON object with the fields of `RouterConfig`; those without a default must be there, unknown
ones are refused. A variable and not flags, as it carries secrets, which other users could read on a command line.

On standard output the router says one line when its ports are open, whether or not workers are there yet:

    ready grpc=127.0.0.1:50051 http=127.0.0.1:8000 metrics=127.0.0.1:9400

Its gRPC health is SERVING, and GET /health gives 200, only while a prefill and a decode worker are linked, or one
that is both. Logs go to standard error. SIGTERM or SIGINT: it refuses new requests, gives the running ones `drain_s`,
and exits with 0. A wrong configuration or a port that is taken: one line on standard error that says what to do, and
exit code 2.
"""

import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from ..core.errors import ConfigError

VARIABLE = "BATON_ROUTER_CONFIG"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    model_dir: Path  # tokenizer, chat template and generation_config.json; no weights are read
    model_name: str  # as clients name it, and as workers register it
    redis_url: str = field(repr=False)  # redis://host:port/0; may hold a password
    cluster_name: str = "baton"
    cluster_token: str = field(default="", repr=False)  # brought to workers; empty: none
    host: str = "127.0.0.1"  # of all three ports
    grpc_port: int = 50051  # 0: any free one
    http_port: int = 8000
    metrics_port: int = 9400
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # any of them lets a client in; none: everybody
    tls_certificate: Path | None = None  # PEM, for both doors; with it a key
    tls_key: Path | None = None
    worker_tls_ca: Path | None = None  # PEM: links to workers use TLS, trusted by this authority
    otlp_endpoint: str | None = None  # http://host:4317; None: no traces are sent
    log_format: str = "console"  # or "json"
    log_level: str = "INFO"
    max_message_bytes: int = 16 << 20  # of one request, at both doors
    max_running: int = 1024  # requests at once
    max_waiting: int = 1024  # sequences that wait for a worker with room
    placement_wait_s: float = 30.0  # the longest that one of them waits
    max_timeout_s: float = 600.0  # the longest that a request runs, whatever its client allows
    keep_ended_s: float = 60.0  # how long an ended request can be asked for
    max_ended: int = 4096  # requests
    max_ended_tokens: int = 1 << 18  # and log probabilities, of their answers together; about 300 bytes each
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("TLS needs both tls_certificate and tls_key, or neither")
        for name in ("grpc_port", "http_port", "metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(f"{name} must be from 0 to 65535")
        for name in ("max_message_bytes", "max_running", "placement_wait_s", "max_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0")
        for name in ("max_waiting", "keep_ended_s", "max_ended", "max_ended_tokens", "drain_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative")
        if not self.model_name:
            raise ConfigError("model_name must not be empty")

    def to_json(self) -> str:
        """What `from_json` reads."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return json.dumps(values, default=str)

    @classmethod
    def from_json(cls, text: str) -> "RouterConfig":
        """Raises ConfigError, which names the field and never shows a value: some are secrets."""
        try:
            values = json.loads(text)
        except ValueError:
            raise ConfigError("the router's configuration is not valid JSON") from None
        if not isinstance(values, dict):
            raise ConfigError("the router's configuration must be a JSON object")
        kinds = typing.get_type_hints(cls)
        unknown = values.keys() - kinds.keys()
        if unknown:
            raise ConfigError(f"the router's configuration has no field {', '.join(sorted(map(repr, unknown)))}")
        missing = {one.name for one in fields(cls) if one.default is MISSING} - values.keys()
        if missing:
            raise ConfigError(f"the router's configuration lacks {', '.join(sorted(missing))}")
        checked: dict[str, typing.Any] = {name: _value(name, kinds[name], value) for name, value in values.items()}
        return cls(**checked)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "RouterConfig":
        """Raises ConfigError."""
        if VARIABLE not in environment:
            raise ConfigError(f"{VARIABLE} is not set: it holds the router's configuration; `baton serve` sets it")
        return cls.from_json(environment[VARIABLE])


def _value(name: str, kind: object, value: object) -> object:
    if isinstance(kind, types.UnionType):  # X | None
        if value is None:
            return None
        kind = next(item for item in typing.get_args(kind) if item is not types.NoneType)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) in (int, float):
        return float(typing.cast(float, value))
    if kind in (str, int) and type(value) is kind:
        return value
    if kind == tuple[str, ...] and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise ConfigError(f"the router's configuration has a {name} of a wrong type")
