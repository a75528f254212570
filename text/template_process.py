"""The process that renders chat templates. A script of its own: standard library and jinja2, nothing of ours.

A template comes with a checkpoint, so it is somebody else's program, and nothing inside an interpreter bounds what one
string multiplication may cost. So it runs here, in jinja2's sandbox, and the kernel bounds memory and CPU time; no file
can grow, and the environment holds no secret. The parent sees an answer, or the end of the stream.

Messages both ways on the socket at descriptor 0: u32 length, little-endian, then JSON.
    first    {"template", "variables", "max_bytes", "cpu_s", "memory_bytes"} -> {"ready": true} | {"broken": reason}
    then     {"messages": [{"role", "content"}]} -> {"text"} | {"refused": message} | {"too_long": true}
"""

import json
import resource
import signal
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LENGTH = struct.Struct("<I")


class TooLong(Exception):
    """The text has more bytes than allowed."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's tokens for training: rendered as what is inside."""

    tags = {"generation"}  # noqa: RUF012 the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Renderer:
    """One compiled template, in the environment that transformers gives it."""

    def __init__(self, template: str, variables: Mapping[str, object], max_bytes: int) -> None:
        """Raises jinja2.TemplateSyntaxError."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(template)
        self._variables = dict(variables)
        self._max_bytes = max_bytes

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Raises TooLong, jinja2.TemplateError, and whatever a template's own mistakes raise."""
        parts: list[str] = []
        num_bytes = 0
        for part in self._template.generate(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._variables
        ):
            num_bytes += len(part.encode())
            if num_bytes > self._max_bytes:
                raise TooLong
            parts.append(part)
        return "".join(parts)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter it does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def answer(render: Callable[[Sequence[Mapping[str, str]]], str], messages: Sequence[Mapping[str, str]]) -> object:
    """Render, whatever happens."""
    try:
        return {"text": render(messages)}
    except TooLong:
        return {"too_long": True}
    except MemoryError:
        return {"refused": "it needs more memory than it is given"}
    except jinja2.TemplateError as error:
        return {"refused": error.message or type(error).__name__}
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"[:500]}


def _receive(connection: socket.socket) -> dict[str, object] | None:
    """The next message; None when the parent is gone."""
    with connection.makefile("rb") as stream:
        head = stream.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            return None
        body = stream.read(_LENGTH.unpack(head)[0])
    message: dict[str, object] = json.loads(body)
    return message


def _send(connection: socket.socket, message: object) -> None:
    body = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(body)) + body)


def _confine(memory_bytes: int) -> None:
    """For good: bounded memory, and no file grows by a byte."""
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def main() -> None:
    """Serve the parent until it goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    connection = socket.socket(fileno=0)
    first = _receive(connection)
    if first is None:
        return
    variables, cpu_s = first["variables"], first["cpu_s"]
    assert isinstance(variables, dict)
    assert isinstance(cpu_s, float)
    _confine(int(str(first["memory_bytes"])))
    signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF ends the process, inside C code too
    try:
        renderer = Renderer(str(first["template"]), variables, int(str(first["max_bytes"])))
    except Exception as error:
        _send(connection, {"broken": f"{type(error).__name__}: {error}"[:500]})
        return
    _send(connection, {"ready": True})
    while True:
        signal.setitimer(signal.ITIMER_PROF, 0)
        request = _receive(connection)
        if request is None:
            return
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        messages = request["messages"]
        assert isinstance(messages, list)
        _send(connection, answer(renderer.render, messages))


if __name__ == "__main__":
    main()
