from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.core.frames import Report
from baton.engine.device_clock import DeviceTime
from baton.engine.preemption import PreemptionCounts
from baton.engine.step_result import StepResult
from baton.wire.worker_codec import report_from_bytes
from baton.worker.records import Record
from baton.worker.reporting import Reporter
from baton.worker.ring import Ring


@pytest.fixture
def rings(tmp_path: Path) -> Iterator[tuple[Ring, Ring]]:
    writer, reader = Ring.create(tmp_path / "r"), Ring.open(tmp_path / "r")
    yield writer, reader
    writer.close()
    reader.close()


def told(reader: Ring) -> Report:
    (data,) = reader.take()
    return report_from_bytes(Record.parse(data).body)


def test_preemptions_and_swaps_are_counted_once_and_told_without_a_step(rings: tuple[Ring, Ring]) -> None:
    writer, reader = rings
    reporter = Reporter(writer)
    assert not reporter.pending()
    reporter.preempted(PreemptionCounts(swapped=2, recomputed=0, swap_bytes=4096))
    reporter.preempted(PreemptionCounts(swapped=2, recomputed=1, swap_bytes=4096))
    assert reporter.pending()
    reporter.flush(0.0, lent_blocks=0, unused_slots=0)
    report = told(reader)
    assert (report.preempted_swap, report.preempted_recompute, report.swap_bytes) == (2, 1, 4096)
    assert not reporter.pending()
    reporter.flush(0.0, lent_blocks=0, unused_slots=0)
    report = told(reader)
    assert (report.preempted_swap, report.preempted_recompute, report.swap_bytes) == (0, 0, 0)


def test_the_device_s_time_is_added_up_and_told_once(rings: tuple[Ring, Ring]) -> None:
    writer, reader = rings
    reporter = Reporter(writer)
    reporter.step(StepResult(device=[DeviceTime(0.5, 0.0), DeviceTime(0.25, 0.125)]), 1.0)
    reporter.step(StepResult(device=[DeviceTime(1.0, 0.0625)]), 1.0)
    reporter.flush(0.0, lent_blocks=0, unused_slots=0)
    report = told(reader)
    assert (report.device_busy_s, report.device_idle_s) == (1.75, 0.1875)
    reporter.flush(0.0, lent_blocks=0, unused_slots=0)
    report = told(reader)
    assert (report.device_busy_s, report.device_idle_s) == (0.0, 0.0)
