"""How fast KV goes from one worker's pool into another's, beside a plain copy of as many bytes.

    python -m benchmarks.transfer [--quick] [--rounds 15]

Source and reader are Ray actors, each a process with one torch thread and a pool of its own. A transfer is 256 MiB of
blocks scattered over both pools, from before the source offers them to when every byte is in the reader's pool and
checked there, by the clock that processes share; so announcement, handing over between threads, and the checksums of
both sides count. Then 1 MiB, many times. The plain copy is numpy's, between two warm buffers of the reader, of 256 MiB,
in turns with the transfers. "Bare" is what the object store costs by itself: `ray.put` here, a call with the ref,
`ray.get` there.

Each row is judged by its quietest round, with the quietest plain copy: what else runs on a shared machine only ever
adds. Medians stand beside it, and the processor time that each side took, which waits for nobody: where that is far
below the round's time, other work had the cores. Exits 1 when a target is missed.
"""

import argparse
import json
import os
import select
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from baton.core.generations import Generations
from baton.core.ids import BlockId, Epoch, SequenceId, TicketId, WorkerId
from baton.core.segment import Segment
from baton.core.tickets import Geometry, Piece
from baton.kv_transfer.by_pair import ray_transport
from baton.kv_transfer.capability import RankPool, Site
from baton.kv_transfer.inbox import Inbox, deliver, greet
from baton.kv_transfer.integrity import checksums
from baton.kv_transfer.messages import Delivery, Returned
from baton.kv_transfer.pool import BlockPool
from baton.kv_transfer.ray_ranks import NAMESPACE

ROOT = Path(__file__).resolve().parents[1]
TOTAL, SMALL = 256 << 20, 1 << 20
LAYERS = {"64 KiB": 1, "256 KiB": 4, "1 MiB": 16, "2 MiB": 32}  # by the block that they make
WAYS = (("mapped", False), ("mapped", True), ("ray_store", True))
LEAST = {("mapped", False): 0.70, ("mapped", True): 0.33, ("ray_store", True): 0.25}  # of the plain copy
MAPPED_MS, TIMES_BARE = 1.0, 1.5  # at most, for 1 MiB
WARM, WAIT_S = 2, 60.0


@dataclass(frozen=True)
class Row:
    way: str
    checksums: bool
    block: str
    gb_per_s: float  # in the quietest round
    median_gb_per_s: float
    share: float  # of the plain copy, both in their quietest rounds
    median_share: float
    least: float
    source_cpu_ms: float  # of a transfer, the least of the rounds
    reader_cpu_ms: float
    copy_cpu_ms: float  # of the plain copy
    load: float  # processes that wanted to run, over the last minute

    @property
    def met(self) -> bool:
        return self.share >= self.least


@dataclass(frozen=True)
class Latency:
    way: str
    median_ms: float
    quietest_ms: float  # the least median of ten turns
    p95_ms: float


def geometry(layers: int) -> Geometry:
    """Blocks of 64 KiB a layer."""
    return Geometry(
        num_layers=layers, num_kv_heads=8, head_size=128, block_tokens=16, dtype="bfloat16", fingerprint="benchmark"
    )


class End:
    """A rank without an engine. `deliver` and `greet` run beside the rest, as a rank's do."""

    def __init__(self, name: str, layers: int, way: str, checked: bool, folder: str) -> None:
        torch.set_num_threads(1)
        self._geometry = geometry(layers)
        block_bytes = self._geometry.block_bytes
        count = TOTAL // block_bytes * 5 // 4
        segment = Segment.create(count * block_bytes)
        self._pool = torch.frombuffer(segment.shared, dtype=torch.uint8).view(count, block_bytes)
        self._pool.numpy().view(np.uint64)[:] = np.arange(block_bytes // 8, dtype=np.uint64)  # every page is there
        self._order = np.random.default_rng(len(name)).permutation(count).tolist()
        generations = Generations.create(count)
        self._inbox = Inbox()
        site = Site(
            worker_id=WorkerId(name),
            epoch=Epoch(1),
            address=name,
            inbox=self._inbox,
            geometry=self._geometry,
            pool=BlockPool(self._pool),
            num_blocks=count,
            pools=(RankPool(segment.address, 0, self._geometry.num_kv_heads),),
            generations=generations,
            socket=Path(folder) / f"{name}.kv",
            transport=way,
            checked=checked,
        )
        self._name = name
        self._stack = ExitStack()
        self._transport = self._stack.enter_context(ray_transport(site))
        self._buffers = np.ones((2, TOTAL), dtype=np.uint8)
        self._poll = select.poll()
        self._poll.register(self._inbox.wakeup.fd, select.POLLIN)
        self._refs: list[Any] = []

    def ready(self) -> int:
        return os.getpid()

    def offers(self, reader: str, num_bytes: int, rounds: int) -> tuple[list[float], list[float]]:
        """When each began, and its processor time here. The next waits for the reader's word."""
        count = num_bytes // self._geometry.block_bytes
        blocks = [BlockId(block) for block in self._order[:count]]
        begun, cpu = [], []
        for _ in range(rounds):
            before = time.process_time()
            begun.append(time.monotonic())
            offered = self._transport.offer(self._piece(count), blocks, reader)
            assert isinstance(self._next().message, Returned)
            offered.result(WAIT_S)
            self._transport.withdraw(TicketId("t"))
            cpu.append(time.process_time() - before)
        return begun, cpu

    def takes(self, source: str, rounds: int, copy: bool) -> tuple[list[float], list[float], list[float], list[float]]:
        """When each was here, and how long a plain copy took after it; processor times of both."""
        ended, copies, cpu, copy_cpu = [], [], [], []
        back = Returned(ticket_id=TicketId("t"), sequence_id=SequenceId("s/0"), source_epoch=Epoch(1))
        for _ in range(rounds):
            pulls, last, before = [], False, time.process_time()
            while not last:
                delivery = self._next()
                piece = delivery.message
                assert isinstance(piece, Piece)
                pulls.append(self._transport.pull(delivery, [self._order[index] for index in piece.blocks]))
                last = piece.last
            for pull in pulls:
                pull.result(WAIT_S)
            ended.append(time.monotonic())
            cpu.append(time.process_time() - before)
            if copy:
                begin, before = time.monotonic(), time.process_time()
                np.copyto(self._buffers[0], self._buffers[1])
                copies.append(time.monotonic() - begin)
                copy_cpu.append(time.process_time() - before)
            self._transport.tell(source, back)
        return ended, copies, cpu, copy_cpu

    def deliver(self, message: bytes, handles: Any) -> None:
        deliver(self._inbox, message, handles)

    def greet(self, record: bytes) -> bytes:
        return greet(self._inbox, record)

    def puts(self, reader: Any, rounds: int) -> list[tuple[float, float]]:
        """Of the object store alone: begin and end of each."""
        import ray

        data, found = np.ones(SMALL, dtype=np.uint8), []
        for _ in range(rounds):
            begin = time.monotonic()
            found.append((begin, ray.get(reader.get.remote([ray.put(data)]))))
        return found

    def get(self, refs: Any) -> float:
        import ray

        ray.get(refs[0])
        return time.monotonic()

    def checks(self) -> dict[str, float]:
        """GB/s of the plain copy and of checksums, of 64 MiB in blocks of this size, once through memory."""
        blocks = self._pool.numpy()[: (64 << 20) // self._geometry.block_bytes]
        into = self._buffers[0][: blocks.nbytes].reshape(blocks.shape)
        few = max(1, SMALL // blocks.shape[1])

        def ours() -> None:
            for at in range(0, len(blocks), few):
                part = blocks[at : at + few]
                checksums(TicketId("t"), range(len(part)), part)

        works: dict[str, Callable[[], object]] = {
            "plain copy": lambda: np.copyto(into, blocks),
            "checksum": ours,
            "CRC-32": lambda: [zlib.crc32(block.data) for block in blocks],
        }
        return {name: blocks.nbytes / min(_timed(work) for _ in range(5)) / 1e9 for name, work in works.items()}

    def leave(self) -> None:
        self._stack.close()

    def _piece(self, count: int) -> Piece:
        return Piece(
            ticket_id=TicketId("t"),
            sequence_id=SequenceId("s/0"),
            reader_epoch=Epoch(1),
            source=WorkerId(self._name),
            source_epoch=Epoch(1),
            source_inbox=self._name,
            blocks=tuple(range(count)),
            checksums=(),
            geometry=self._geometry,
            last=True,
            first_token=1,
        )

    def _next(self) -> Delivery:
        while True:
            for delivery in self._inbox.drain():
                self._refs.append(delivery)
            if self._refs:
                delivery = self._refs.pop(0)
                assert isinstance(delivery, Delivery)
                return delivery
            assert self._poll.poll(WAIT_S * 1000), "no message came"
            self._inbox.wakeup.clear()


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Times:
    """Seconds of each round."""

    transfers: list[float]
    copies: list[float]
    source_cpu: list[float]
    reader_cpu: list[float]
    copy_cpu: list[float]


class Pair:
    """Both ends, for one way and one size of block."""

    def __init__(self, layers: int, way: str, checked: bool, folder: str) -> None:
        import ray

        remote: Any = ray.remote
        kind = remote(num_cpus=0, concurrency_groups={"inbox": 1, "greet": 1})(_actor())
        self.names = [f"{side}-{layers}-{way}-{checked}" for side in ("source", "reader")]
        self.source, self.reader = (
            kind.options(name=name).remote(name, layers, way, checked, folder) for name in self.names
        )
        ray.get([self.source.ready.remote(), self.reader.ready.remote()])

    def run(self, num_bytes: int, rounds: int, *, copy: bool) -> "Times":
        import ray

        taking = self.reader.takes.remote(self.names[0], rounds, copy)
        begun, source_cpu = ray.get(self.source.offers.remote(self.names[1], num_bytes, rounds))
        ended, copies, reader_cpu, copy_cpu = ray.get(taking)
        seconds = [end - begin for begin, end in zip(begun, ended, strict=True)]
        return Times(seconds, copies, source_cpu, reader_cpu, copy_cpu)

    def close(self) -> None:
        import ray

        for end in (self.source, self.reader):
            ray.get(end.leave.remote())
            ray.kill(end)


def _actor() -> type:
    import ray

    class Actor(End):
        deliver = ray.method(concurrency_group="inbox")(End.deliver)
        greet = ray.method(concurrency_group="greet")(End.greet)

    return Actor


def row(way: str, checked: bool, block: str, times: Times) -> Row:
    copies, best, median = times.copies, min(times.transfers), statistics.median(times.transfers)
    return Row(
        way=way,
        checksums=checked,
        block=block,
        gb_per_s=TOTAL / best / 1e9,
        median_gb_per_s=TOTAL / median / 1e9,
        share=min(copies) / best,
        median_share=statistics.median(copies) / median,
        least=LEAST[way, checked],
        source_cpu_ms=min(times.source_cpu) * 1e3,
        reader_cpu_ms=min(times.reader_cpu) * 1e3,
        copy_cpu_ms=min(times.copy_cpu) * 1e3,
        load=os.getloadavg()[0],
    )


def latency(way: str, seconds: list[float]) -> Latency:
    turn = max(1, len(seconds) // 10)
    medians = [statistics.median(seconds[at : at + turn]) for at in range(0, len(seconds) - turn + 1, turn)]
    return Latency(
        way=way,
        median_ms=statistics.median(seconds) * 1e3,
        quietest_ms=min(medians) * 1e3,
        p95_ms=sorted(seconds)[len(seconds) * 95 // 100] * 1e3,
    )


def measure(rounds: int, small_rounds: int, blocks: list[str], folder: str) -> tuple[list[Row], list[Latency], Any]:
    import ray

    rows, latencies, checks = [], [], {}
    for block in blocks:
        for way, checked in WAYS:
            pair = Pair(LAYERS[block], way, checked, folder)
            pair.run(TOTAL, WARM, copy=True)
            rows.append(row(way, checked, block, pair.run(TOTAL, rounds, copy=True)))
            print_row(rows[-1])
            if block == "64 KiB" and checked:
                pair.run(SMALL, small_rounds // 10, copy=False)
                latencies.append(latency(way, pair.run(SMALL, small_rounds, copy=False).transfers))
                if way == "ray_store":
                    bare = ray.get(pair.source.puts.remote(pair.reader, small_rounds))
                    latencies.append(latency("bare", [end - begin for begin, end in bare]))
            if way == "mapped" and checked:
                checks[block] = ray.get(pair.reader.checks.remote())
            pair.close()
    return rows, latencies, checks


def print_row(one: Row) -> None:
    name = f"{one.way}, {'with' if one.checksums else 'no'} checksums, blocks of {one.block}"
    print(
        f"{'pass' if one.met else 'FAIL'}  {name:<46} {one.gb_per_s:5.2f} GB/s, {one.share:4.0%} of a plain copy (at"
        f" least {one.least:.0%}); medians {one.median_gb_per_s:5.2f}, {one.median_share:4.0%}; processor ms: source"
        f" {one.source_cpu_ms:.0f}, reader {one.reader_cpu_ms:.0f}, copy {one.copy_cpu_ms:.0f}; load {one.load:.1f}",
        flush=True,
    )


def print_small(latencies: list[Latency]) -> bool:
    found = {one.way: one for one in latencies}
    for one in latencies:
        print(
            f"      1 MiB, {one.way:<10} median {one.median_ms:6.2f} ms, of the quietest turn {one.quietest_ms:6.2f},"
            f" p95 {one.p95_ms:6.2f}"
        )
    times = found["ray_store"].quietest_ms / found["bare"].quietest_ms
    fast = found["mapped"].quietest_ms <= MAPPED_MS
    print(f"{'pass' if fast else 'FAIL'}  1 MiB mapped in {found['mapped'].quietest_ms:.2f} ms (at most {MAPPED_MS})")
    near = times <= TIMES_BARE
    print(
        f"{'pass' if near else 'FAIL'}  1 MiB by the store in {times:.2f} times the bare store (at most {TIMES_BARE})"
    )
    return fast and near


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rounds", type=int, default=15, help="of 256 MiB (default: %(default)s)")
    flags.add_argument("--quick", action="store_true", help="one size of block, few rounds, no file")
    args = flags.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    from .machine import machine

    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        namespace=NAMESPACE,
        object_store_memory=1 << 30,
        log_to_driver=False,
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            blocks = ["64 KiB"] if args.quick else list(LAYERS)
            rounds, small = (6, 50) if args.quick else (args.rounds, 500)
            rows, latencies, checks = measure(rounds, small, blocks, folder)
    finally:
        ray.shutdown()
    met = print_small(latencies)
    for block, rates in checks.items():
        print(f"      {block}: " + ", ".join(f"{name} {rate:.2f} GB/s" for name, rate in rates.items()))
    if not args.quick:
        found = {
            **machine("ray", "numpy", "torch"),
            "rows": [asdict(one) for one in rows],
            "small": [asdict(one) for one in latencies],
            "checksums_gb_per_s": checks,
        }
        (ROOT / "benchmarks" / "results" / "transfer.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0 if met and all(one.met for one in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
