"""Waits of the host for a device. Each has an end: a rank that hangs leaves the others' devices in a kernel that would
never return."""

from time import perf_counter, sleep

import torch

PATIENCE_S = 60.0
_LOOK_S = 20e-6


class DeviceStuck(Exception):
    """What was queued on the device is not done in time: it hangs, or a rank that it waits for. The worker ends."""


def wait_for(event: torch.cuda.Event) -> None:
    """Until what was queued before the event is done. Raises DeviceStuck."""
    if event.query():  # type: ignore[no-untyped-call]
        return
    deadline = perf_counter() + PATIENCE_S
    while not event.query():  # type: ignore[no-untyped-call]
        if perf_counter() > deadline:
            raise DeviceStuck(f"the device has not done within {PATIENCE_S:.0f} s what was queued")
        sleep(_LOOK_S)


def settle(device: torch.device) -> None:
    """Until all that was queued on the current stream is done. Raises DeviceStuck."""
    wait_for(torch.cuda.current_stream(device).record_event())
