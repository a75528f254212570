"""Shows the logs of our processes on standard error while they are written."""

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TextIO

_LOOK_S = 0.25
_MOST_BYTES = 1 << 20  # of one file at a look, so that a flood of one does not hide the others


class Tail:
    """Copies whole lines of every `*.log` in a folder, in the order in which they are seen; an endless one in parts."""

    def __init__(
        self,
        folder: Path,
        stream: TextIO | None = None,
        *,
        aside: Callable[[], AbstractContextManager[None]] = nullcontext,  # to write within: others use the terminal too
    ) -> None:
        self._folder = folder
        self._stream = stream or sys.stderr
        self._aside = aside
        self._read: dict[Path, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-tail", daemon=True)

    def __enter__(self) -> "Tail":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """What was written until now still comes."""
        self._ended.set()
        self._thread.join(5)
        self.look()

    def look(self) -> None:
        for path in sorted(self._folder.glob("*.log")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                data = file.read(_MOST_BYTES)
            endless = len(data) == _MOST_BYTES and b"\n" not in data
            whole = data if endless else data[: data.rfind(b"\n") + 1]
            if whole:
                self._read[path] = self._read.get(path, 0) + len(whole)
                with self._aside(), suppress(OSError):  # the terminal may be closed
                    self._stream.write(whole.decode(errors="replace"))
                    self._stream.flush()

    def _run(self) -> None:
        while not self._ended.wait(_LOOK_S):
            self.look()
