from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.core.frames import Report
from baton.engine.preemption import PreemptionCounts
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
