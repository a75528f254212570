"""What `baton serve` shows: progress while it starts, then a banner. One line rewritten in place on a terminal, plain
lines elsewhere."""

import sys
from typing import TextIO

from .config import DEFAULT_ADDRESS, ServeConfig

_BAR = 24
_THIS_MACHINE = ("127.0.0.1", "::1", "localhost")
_OPEN_TO_ALL = ("  Whoever reaches these ports may use them: set BATON_API_KEYS, or listen on 127.0.0.1.", "")


class Screen:
    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._shown = ""

    def say(self, line: str) -> None:
        """A line that stays."""
        self._clear()
        print(line, file=self._stream, flush=True)

    def progress(self, line: str) -> None:
        """What goes on now: replaces the last one. Off a terminal it is printed once for each change."""
        if line == self._shown:
            return
        if self._live:
            self._stream.write(f"\r\x1b[2K{line}")
            self._stream.flush()
        else:
            print(line, file=self._stream, flush=True)
        self._shown = line

    def _clear(self) -> None:
        if self._live and self._shown:
            self._stream.write("\r\x1b[2K")
        self._shown = ""


def bar(done: int, total: int) -> str:
    """ "[######......]  50 %", in steps of 10 % so that plain lines stay few."""
    tenths = 10 * done // total if total else 0
    filled = _BAR * tenths // 10
    return f"[{'#' * filled}{'.' * (_BAR - filled)}] {10 * tenths:3d} %"


def banner(config: ServeConfig, model: str, *, keys: bool) -> str:
    """Addresses and three commands to try. `keys`: callers need an API key."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)  # noqa: S104  # only compared
    host = f"[{host}]" if ":" in host else host
    scheme = "https" if config.tls_cert else "http"
    grpc = f"{host}:{config.grpc_port}"
    http = f"{scheme}://{host}:{config.http_port}"
    flags = "" if grpc == DEFAULT_ADDRESS else f" --address {grpc}"
    flags += f" --tls-ca {config.tls_cert}" if config.tls_cert else ""
    header = ' -H "Authorization: Bearer $BATON_API_KEY"' if keys else ""
    lines = [
        "",
        f"  Baton serves {model}: {config.prefill} prefill and {config.decode} decode.",
        "",
        f"    gRPC     {grpc}",
        f"    HTTP     {http}/v1",
        f"    metrics  http://{host}:{config.metrics_port}/metrics",
        "",
        "  Try, from another terminal" + (", with BATON_API_KEY set:" if keys else ":"),
        "",
        f'    baton generate{flags} --max-tokens 48 "A list comprehension"',
        f"    baton chat{flags}",
        f"    curl{header} {http}/v1/models",
        "",
        *(_OPEN_TO_ALL if not keys and config.host not in _THIS_MACHINE else ()),
        "  Ctrl-C ends it and leaves nothing behind.",
        "",
    ]
    return "\n".join(lines)
