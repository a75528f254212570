"""Logs to standard error, for people or for machines, each line with the request and the trace it belongs to."""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

from ..core.errors import ConfigError

FORMATS = ("console", "json")

_request_id: ContextVar[str] = ContextVar("request_id", default="")
_trace_id: ContextVar[str] = ContextVar("trace_id", default="")


@contextmanager
def request_context(request_id: str, trace_id: str = "") -> Iterator[None]:
    """Within it, and in tasks started within it, every log line carries both ids."""
    tokens = _request_id.set(request_id), _trace_id.set(trace_id)
    try:
        yield
    finally:
        _request_id.reset(tokens[0])
        _trace_id.reset(tokens[1])


def setup(format: str = "console", level: str = "INFO", service: str = "baton", stream: TextIO | None = None) -> None:
    """Sends the process's logs to `stream` (standard error) in place of what was set before. Raises ConfigError."""
    if format not in FORMATS:
        raise ConfigError(f"log format must be one of {', '.join(FORMATS)}, not {format!r}")
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ConfigError(f"log level must be DEBUG, INFO, WARNING or ERROR, not {level!r}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(service) if format == "json" else ConsoleFormatter(service))
    logging.basicConfig(level=number, handlers=[handler], force=True)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, service, logger, message; ids and exception where there are any."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _utc(record.created),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {key: value for key, value in _ids().items() if value}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class ConsoleFormatter(logging.Formatter):
    """A line for people. Control characters are escaped, so that no request can forge a line."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        ids = "".join(f" {key}={_visible(value)}" for key, value in _ids().items() if value)
        line = f"{_utc(record.created)} {record.levelname:<7} {self._service} {_visible(record.getMessage())}{ids}"
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def _ids() -> dict[str, str]:
    return {"request_id": _request_id.get(), "trace_id": _trace_id.get()}


def _utc(seconds: float) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(seconds * 1000) % 1000:03d}Z"


def _visible(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
