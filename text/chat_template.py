"""Conversations to prompts: the model's own chat template, rendered as transformers does, in a confined process."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..core.errors import ConfigError, ContextExceeded, InvalidRequest, Overloaded
from .model_files import read_object

MAX_BYTES = 16 << 20  # of messages, and of the text that they become
MAX_MESSAGES = 4096
_MEMORY_BYTES = 512 << 20
_CPU_S = 2.0
_ANSWER_TIMEOUT_S = 30.0  # on the clock; the process ends itself by CPU time long before, unless it gets none
_LENGTH = struct.Struct("<I")
_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL")


class Message(Protocol):
    """One turn of a conversation."""

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str: ...


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


class ChatTemplate:
    """One template, compiled in a process of its own, that renders one conversation at a time.

    The process may use 512 MiB of memory and 2 s of CPU for one conversation; a template that needs more ends it, and
    the next call starts another. Threads may share this object. `render` blocks: keep it off the event loop.
    """

    def __init__(
        self,
        template: str,
        variables: Mapping[str, str],
        *,
        max_bytes: int = MAX_BYTES,
        cpu_s: float = _CPU_S,
        memory_bytes: int = _MEMORY_BYTES,
    ) -> None:
        """`variables`: "bos_token" and its like. Raises ConfigError when the template can't be compiled."""
        self._first = {
            "template": template,
            "variables": dict(variables),
            "max_bytes": max_bytes,
            "cpu_s": float(cpu_s),
            "memory_bytes": memory_bytes,
        }
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        with self._lock:
            self._connected()

    @classmethod
    def from_dir(cls, path: Path, variables: Mapping[str, str]) -> "ChatTemplate | None":
        """The model's template: chat_template.jinja, else `chat_template` of tokenizer_config.json; None without one.
        Raises ConfigError."""
        template = template_source(path)
        return None if template is None else cls(template, variables)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt, up to where the answer begins.

        Raises InvalidRequest with the template's own words when it refuses the messages, or when it takes too long or
        too much memory; ContextExceeded when messages or prompt are larger than `max_bytes`; Overloaded when other
        conversations keep the process busy.
        """
        if len(messages) > MAX_MESSAGES:
            raise InvalidRequest(f"a conversation has at most {MAX_MESSAGES} messages, not {len(messages)}")
        if sum(len(message.content) + len(message.role) for message in messages) > self._max_bytes:
            raise self._too_long()
        request = {"messages": [{"role": message.role, "content": message.content} for message in messages]}
        if not self._lock.acquire(timeout=_ANSWER_TIMEOUT_S):
            raise Overloaded("the chat template is busy with other conversations")
        try:
            reply = self._ask(request)
        finally:
            self._lock.release()
        if "too_long" in reply:
            raise self._too_long()
        if "refused" in reply:
            raise InvalidRequest(f"the model's chat template refused the messages: {reply['refused']}")
        return str(reply["text"])

    def close(self) -> None:
        """End the process. A later `render` starts another."""
        with self._lock:
            self._stop()

    def _too_long(self) -> ContextExceeded:
        return ContextExceeded(f"the conversation has more than {self._max_bytes} bytes")

    def _ask(self, request: Mapping[str, object]) -> dict[str, object]:
        connection = self._connected()
        try:
            _send(connection, request)
            return _receive(connection)
        except (OSError, EOFError) as error:
            returncode = self._stop()
            late = isinstance(error, TimeoutError) or returncode == -signal.SIGPROF
            why = "took too long" if late else "needed more than it is given"
            raise InvalidRequest(f"the model's chat template was stopped: it {why} for these messages") from error
        except BaseException:
            self._stop()  # an answer not read would be taken for the next one's
            raise

    def _connected(self) -> socket.socket:
        """The connection to a process that has compiled the template."""
        if self._connection is not None and self._process is not None and self._process.poll() is None:
            return self._connection
        self._stop()
        connection, theirs = socket.socketpair()
        connection.settimeout(_ANSWER_TIMEOUT_S)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 our own script
                [sys.executable, "-P", str(Path(__file__).with_name("template_process.py"))],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
            )
        self._connection = connection
        try:
            _send(connection, self._first)
            reply = _receive(connection)
        except (OSError, EOFError):
            reply = {"broken": f"it could not be compiled (process ended with {self._stop()})"}
        if "broken" in reply:
            self._stop()
            raise ConfigError(f"the model's chat template is broken: {reply['broken']}")
        return connection

    def _stop(self) -> int | None:
        """End the process; returns how it ended: negative is a signal."""
        process, self._process = self._process, None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if process is None:
            return None
        try:
            return process.wait(timeout=0.2)  # it ends by itself when its connection does
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def template_source(path: Path) -> str | None:
    """Source of the model's chat template; of several named ones the one called "default". Raises ConfigError."""
    file = path / "chat_template.jinja"
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read {file}: {error}") from error
    template = read_object(path / "tokenizer_config.json").get("chat_template")
    if template is None:  # older checkpoints have a file of its own
        template = read_object(path / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
        if template is None:
            raise ConfigError(f"{path}: none of the chat templates is called 'default'")
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"{path}: chat_template must be text or a list of named templates")
    return template


def _send(connection: socket.socket, message: object) -> None:
    body = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(body)) + body)


def _receive(connection: socket.socket) -> dict[str, object]:
    """Raises EOFError when the process is gone, TimeoutError when it is silent."""
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    message: dict[str, object] = json.loads(_read(connection, length))
    return message


def _read(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
