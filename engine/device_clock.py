"""How long a GPU works at each step, and how long it waits for the host between two, by its own clock."""

from collections import deque
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """Of one step, in seconds."""

    busy_s: float  # from its first launch to its last
    idle_s: float  # since the step before, where it was launched right after that one; else 0


@dataclass(slots=True)
class _Mark:
    begin: torch.cuda.Event
    follows: bool
    end: torch.cuda.Event | None = None


class DeviceClock:
    """Marks steps on the current stream, and reads the marks once the device has passed them; never waits for it.

    On a CPU it tells nothing: there is no launch apart from the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._on = device.type == "cuda"
        self._marks: deque[_Mark] = deque()
        self._before: torch.cuda.Event | None = None  # end of the step that was read last

    def begin(self, follows: bool) -> None:
        """A step is launched from here on. follows: there was one just before it, with nothing to wait for."""
        if self._on:
            self._marks.append(_Mark(_event(), follows))

    def end(self) -> None:
        """All of the step begun last is launched."""
        if self._on:
            self._marks[-1].end = _event()

    def read(self) -> list[DeviceTime]:
        """Of the steps that are over and not yet read, in order."""
        found = []
        while self._marks and self._marks[0].end is not None and self._marks[0].end.query():  # type: ignore[no-untyped-call]
            mark, before = self._marks.popleft(), self._before
            self._before = end = mark.end
            idle = _seconds(before, mark.begin) if before is not None and mark.follows else 0.0
            found.append(DeviceTime(_seconds(mark.begin, end), idle))
        return found


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _seconds(begin: torch.cuda.Event, end: torch.cuda.Event | None) -> float:
    assert end is not None
    return float(begin.elapsed_time(end)) / 1e3
