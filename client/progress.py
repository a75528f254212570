"""How far a list of requests is, as one line of a terminal that is rewritten in place."""

import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self, TextIO

_EVERY_S = 0.1  # between two drawings: a terminal is slow
_BAR = 20  # characters


class ProgressLine:
    """Shown from `__enter__` to `__exit__`, where the line stays as it is. One thread at a time."""

    def __init__(
        self,
        total: int,
        *,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """total: requests. On a stream that is no terminal nothing is written."""
        self._total = total
        self._stream = stream or sys.stderr
        self._shown = shown and self._stream.isatty()
        self._clock = clock
        self._begin = self._drawn = clock()
        self._done = self._tokens_in = self._tokens_out = 0

    def add(self, *, done: int = 0, tokens_in: int = 0, tokens_out: int = 0) -> None:
        """What came since the last call: requests that ended, tokens of prompts and of answers."""
        self._done += done
        self._tokens_in += tokens_in
        self._tokens_out += tokens_out
        if self._shown and self._clock() >= self._drawn + _EVERY_S:
            self._draw()

    def __enter__(self) -> Self:
        if self._shown:
            self._draw()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._shown:
            self._draw()
            self._write("\n")

    def _draw(self) -> None:
        self._drawn = self._clock()
        line = render(self._done, self._total, self._tokens_in, self._tokens_out, self._drawn - self._begin)
        # What wraps could not be taken back.
        self._write("\r\x1b[2K" + line[: shutil.get_terminal_size().columns - 1])

    def _write(self, text: str) -> None:
        with suppress(OSError):  # a terminal that was closed is no reason to stop
            self._stream.write(text)
            self._stream.flush()


def render(done: int, total: int, tokens_in: int, tokens_out: int, seconds: float) -> str:
    filled = _BAR * done // total if total else _BAR
    per_s = (f"{tokens / seconds if seconds > 0 else 0.0:,.0f}" for tokens in (tokens_in, tokens_out))
    minutes, rest = divmod(int(seconds), 60)
    return "[{}{}] {}/{} requests, tokens/s in {} out {}, {}:{:02d}".format(
        "#" * filled, "." * (_BAR - filled), done, total, *per_s, minutes, rest
    )
