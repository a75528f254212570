"""What `baton serve` shows: progress while it starts, then a banner. One line rewritten in place on a terminal, plain
lines elsewhere."""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from .config import DEFAULT_ADDRESS, ServeConfig

_THIS_MACHINE = ("127.0.0.1", "::1", "localhost")
_OPEN_TO_ALL = ("  Whoever reaches these ports may use them: set BATON_API_KEYS, or listen on 127.0.0.1.", "")


class Screen:
    """A terminal that was closed takes nothing more: that is no reason to stop, least of all while we clean up."""

    def __init__(self, stream: TextIO | None = None, *, as_json: bool = False, notices: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._notices = notices or sys.stderr
        self._json = as_json
        self._live = self._stream.isatty()
        self._shown = ""
        self._lock = threading.RLock()  # logs are shown by a thread of their own

    def say(self, line: str) -> None:
        """A line that stays."""
        with self._lock:
            self._clear()
            self._shown = ""
            self._write(line + "\n")

    def notice(self, line: str) -> None:
        """Something happened. For machines it is a JSON object among the logs."""
        if not self._json:
            self.say(line)
            return
        with self.aside(), suppress(OSError):
            print(json_line("INFO", line), file=self._notices, flush=True)

    def progress(self, line: str) -> None:
        """What goes on now: replaces the last one. Off a terminal it is printed once for each change."""
        with self._lock:
            if line == self._shown:
                return
            self._shown = line
            if self._live:
                self._draw()
            else:
                self._write(line + "\n")

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Whoever else writes to the terminal does it within: the line in place makes room and comes back."""
        with self._lock:
            self._clear()
            try:
                yield
            finally:
                if self._live and self._shown:
                    self._draw()

    def _draw(self) -> None:
        """One row at most: what wraps could not be taken back."""
        room = shutil.get_terminal_size().columns - 1
        fits = self._shown if len(self._shown) <= room else self._shown[: max(0, room - 3)] + "..."
        self._write(f"\r\x1b[2K{fits}")

    def _clear(self) -> None:
        if self._live and self._shown:
            self._write("\r\x1b[2K")

    def _write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)
            self._stream.flush()


def json_line(level: str, message: str) -> str:
    """As the processes' own logs under --log-format json."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return json.dumps({"time": now, "level": level, "service": "serve", "message": message}, ensure_ascii=False)


def percent(done: int, total: int) -> str:
    """ "50 %", in steps of 10 % so that plain lines stay few."""
    return f"{10 * (10 * done // total if total else 0)} %"


def own_command() -> str:
    """What starts `baton` from here: its name if that is found, else its path, else the module."""
    script = Path(sys.argv[0])
    if script.name != "baton" or not os.access(script, os.X_OK):
        return f"{_short(Path(sys.executable))} -m baton.cluster.cli"
    found = shutil.which("baton")
    return "baton" if found and Path(found).resolve() == script.resolve() else _short(script)


def _short(path: Path) -> str:
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _workers(config: ServeConfig) -> str:
    """Such as "1 prefill worker and 2 decode workers" or "2 workers that do both"."""
    counts = ((config.prefill, "prefill"), (config.decode, "decode"))
    parts = [f"{count} {role} worker{'s' if count > 1 else ''}" for count, role in counts if count]
    if config.both:
        noun = "" if parts else " worker" if config.both == 1 else " workers"
        parts.append(f"{config.both}{noun} that {'does' if config.both == 1 else 'do'} both")
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def banner(config: ServeConfig, model: str, *, keys: bool) -> str:
    """Addresses and three commands to try. `keys`: callers need an API key."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)  # noqa: S104  # only compared
    host = f"[{host}]" if ":" in host else host
    scheme = "https" if config.tls_cert else "http"
    grpc = f"{host}:{config.grpc_port}"
    http = f"{scheme}://{host}:{config.http_port}"
    baton = own_command()
    flags = "" if grpc == DEFAULT_ADDRESS else f" --address {grpc}"
    flags += f" --tls-ca {config.tls_cert}" if config.tls_cert else ""
    header = ' -H "Authorization: Bearer $BATON_API_KEY"' if keys else ""
    lines = [
        "",
        f"  Baton serves {model}: {_workers(config)}.",
        "",
        f"    gRPC     {grpc}",
        f"    HTTP     {http}/v1",
        f"    metrics  http://{host}:{config.metrics_port}/metrics",
        "",
        "  Try, from another terminal" + (", with BATON_API_KEY set:" if keys else ":"),
        "",
        f'    {baton} generate{flags} --max-tokens 48 "A list comprehension"',
        f"    {baton} chat{flags}",
        f"    curl{header} {http}/v1/models",
        "",
        *(_OPEN_TO_ALL if not keys and config.host not in _THIS_MACHINE else ()),
        "  Ctrl-C ends it and leaves nothing behind.",
        "",
    ]
    return "\n".join(lines)
