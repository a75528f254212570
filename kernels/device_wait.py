"""Waits of the host for a device. Each has an end: a rank that hangs leaves the others' devices in a kernel that would
never return. Not bounded is a launch that finds the device's queue full, of about a thousand launches."""

from time import perf_counter, sleep

import torch

PATIENCE_S = 60.0
_SPIN_S = 200e-6  # a sleep of the least time takes a hundred microseconds
_SLEEP_S = 20e-6


class DeviceStuck(Exception):
    """What was queued on the device is not done in time: it hangs, or a rank that it waits for. The worker ends."""


def mark(device: torch.device) -> torch.cuda.Event | None:
    """For `wait_for`: what is queued on the current stream by now. None on a CPU, where nothing is."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def wait_for(event: torch.cuda.Event | None) -> None:
    """Until what was queued before the mark is done. Raises DeviceStuck."""
    if event is None or event.query():  # type: ignore[no-untyped-call]
        return
    begin = perf_counter()
    while not event.query():  # type: ignore[no-untyped-call]
        waited_s = perf_counter() - begin
        if waited_s > PATIENCE_S:
            raise DeviceStuck(f"the device has not done within {PATIENCE_S:.0f} s what was queued")
        if waited_s > _SPIN_S:
            sleep(_SLEEP_S)


def settle(device: torch.device) -> None:
    """Until all that was queued on the current stream is done. Raises DeviceStuck."""
    wait_for(mark(device))
