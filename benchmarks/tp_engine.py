"""One model over two GPUs of a host, of an 8B's shape with random weights: a process for each rank, as in serving.

    PYTHONPATH=src python -m benchmarks.tp_engine [--quick] [--profile] [--json FILE]

First the sum of both ranks' products, added to the stream and normalised, as it is in a layer: `peer_sum` in a captured
graph of 64, each word with its number beside it or rows first and numbers after, and NCCL's all-reduce with the norm's
kernel after it, launched op by op behind a kernel that lasts until all are queued. Each is compared with float32.

Then ms per token of one sequence (prompt 128, 256 new), and ms per step of 16, 64 and 256 sequences. Target: at most
2.6 ms for one. "floor": what a rank has of the weights and of the mean KV, read once, at the rate of plain reads that
the same run measures. "idle" is the share of the time that rank 0's GPU had nothing to do between two steps.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from torch import Tensor

from baton.engine.engine import Engine
from baton.engine.kv_cache import KvCache
from baton.engine.loading import RankPart
from baton.engine.models.shard import Shard
from baton.engine.parallel.communicator import Communicator
from baton.engine.parallel.follower import Follower, Followers
from baton.engine.parallel.gpus import meet_on_gpus
from baton.engine.parallel.nccl import Nccl
from baton.engine.parallel.peers import Peers
from baton.engine.parallel.peers import add_rms_norm as sum_and_norm
from baton.engine.parallel.plan_channel import PlanReader, PlanWriter
from baton.engine.parallel.rendezvous import Rendezvous
from baton.kernels import peer_sum
from baton.kernels.norm import add_rms_norm

from .gpu_engine import SHAPE_8B, batch_of, config_of, engine_bytes, geometry_of, random_model, run_out
from .kernels import Table, probe

GIB = 1 << 30
TARGET_MS = 2.6
ROWS = (1, 8, 16, 32, 64, 128, 256, 512)
SUMS = 64  # in a graph: two for each of 32 layers
KV_BYTES = 40 * GIB  # of each rank
BATCHES = (16, 64, 256)
POSITIONS = 8192
HIDDEN = 4096  # of SHAPE_8B


@dataclass(frozen=True)
class Case:
    """Of one number of rows; each rank's of its own."""

    delta: Tensor  # [T, hidden]
    stream: Tensor  # [T, hidden]
    weight: Tensor  # [hidden]

    @classmethod
    def of(cls, rows: int, hidden: int, rank: int, device: torch.device) -> "Case":
        def numbers(seed: int, *shape: int) -> Tensor:
            generator = torch.Generator(device).manual_seed(seed)
            return torch.randn(shape, generator=generator, device=device).bfloat16()

        return cls(numbers(rank, rows, hidden), numbers(2, rows, hidden), numbers(3, hidden).abs() + 0.5)

    def expected(self, nccl: Communicator) -> tuple[Tensor, Tensor]:
        """(stream after it, its norm), in float32."""
        total = self.stream.float() + nccl.all_reduce(self.delta.float())
        return total, total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight.float()


def check(case: Case, peers: Peers, nccl: Communicator, few_bytes: int) -> None:
    """Raises where it is off by more than bfloat16 rounds."""
    stream, (total, normed) = case.stream.clone(), case.expected(nccl)
    with few(few_bytes):
        found = sum_and_norm(peers, case.delta, stream, case.weight, 1e-5)
    for value, wanted in ((stream, total), (found, normed)):
        off = ((value.float() - wanted).abs() / wanted.abs().clamp(min=0.1)).max().item()
        if off > 2**-6:
            raise AssertionError(f"rank {peers.rank}, {len(stream)} rows, few {few_bytes}: off by {off:.3g}")


class few:  # noqa: N801 # a verb of this file
    """How many bytes travel with their numbers, for a while."""

    def __init__(self, few_bytes: int) -> None:
        self._bytes = few_bytes

    def __enter__(self) -> None:
        self._before, peer_sum.FEW_BYTES = peer_sum.FEW_BYTES, self._bytes  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        peer_sum.FEW_BYTES = self._before  # type: ignore[attr-defined]


def of_graph_us(work: Callable[[], object], peers: Communicator) -> float:
    """Microseconds of one of SUMS in a graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(SUMS):
            work()
    return _median_us(graph.replay, peers)


def of_launches_us(work: Callable[[], object], peers: Communicator) -> float:
    """The same, launched one by one behind a kernel that lasts for 20 ms."""

    def all_of_them() -> None:
        for _ in range(SUMS):
            work()

    all_of_them()
    return _median_us(all_of_them, peers, behind=True)


def _median_us(work: Callable[[], object], peers: Communicator, behind: bool = False) -> float:
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        peers.barrier()
        if behind:
            torch.cuda._sleep(40_000_000)  # type: ignore[no-untyped-call] # clocks
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / SUMS)
    return statistics.median(times[2:])


def sums(
    peers: Peers, nccl: Communicator, hidden: int, device: torch.device, rows: tuple[int, ...]
) -> dict[str, float]:
    """us by name. Both ranks run this, the first prints."""
    found: dict[str, float] = {}
    if peers.rank == 0:
        print(f"{'add_rms_norm of a sum, us':<28}{'numbers beside':>16}{'numbers after':>16}{'NCCL + norm':>14}")
    ways = {"beside": peer_sum.FEW_BYTES, "after": 0}
    for count in rows:
        case = Case.of(count, hidden, peers.rank, device)
        stream = case.stream.clone()
        line = []
        for way, few_bytes in ways.items():
            if way == "beside" and case.delta.nbytes > peer_sum.FEW_BYTES:
                line.append(f"{'-':>16}")
                continue
            check(case, peers, nccl, few_bytes)
            with few(few_bytes):
                us = of_graph_us(lambda: sum_and_norm(peers, case.delta, stream, case.weight, 1e-5), peers)  # noqa: B023
            found[f"{way} {count}"] = us
            line.append(f"{us:>16.2f}")
            stream.copy_(case.stream)

        def by_nccl() -> None:
            add_rms_norm(nccl.all_reduce(case.delta), stream, case.weight, 1e-5)  # noqa: B023

        found[f"nccl {count}"] = of_launches_us(by_nccl, nccl)
        if peers.rank == 0:
            print(f"{f'[{count}, {hidden}] bfloat16':<28}{''.join(line)}{found[f'nccl {count}']:>14.2f}", flush=True)
    return found


@dataclass(frozen=True)
class Row:
    workload: str
    ms: float
    of_floor: float
    idle: float


def answer(engine: Engine, count: int, prompt: int, new: int) -> tuple[list[float], list[float]]:
    """(ms of each step, ms of each gap)."""
    return run_out(engine, batch_of(engine, count, prompt, new, 8192, before=new))


def measure(engine: Engine, reads: float, batches: tuple[int, ...]) -> list[Row]:
    weights, kv_token = engine_bytes(engine.config)

    def row(name: str, sequences: int, context: int, steps: list[float], gaps: list[float]) -> Row:
        ms = statistics.median(steps) + statistics.median(gaps)
        floor = (weights + sequences * context * kv_token) / 2 / reads * 1e3
        return Row(name, ms, floor / ms, sum(gaps) / (sum(gaps) + sum(steps)))

    answer(engine, 1, 128, 16)
    steps, gaps = answer(engine, 1, 128, 257)
    rows = [row("1 x (128 + 256)", 1, 256, steps[8:], gaps[8:])]
    for count in batches:
        steps, gaps = answer(engine, count, 2000, 97)
        rows.append(row(f"{count} x 2,000", count, 2048, steps[-80:-8], gaps[-80:-8]))
    return rows


def profile(engine: Engine) -> str:
    """Which kernels rank 0's steps are made of."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        answer(engine, 1, 128, 33)
    return found.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70)


def rank_part(communicator: Communicator, device: torch.device) -> RankPart:
    config = config_of(SHAPE_8B)
    heads = Shard(communicator.rank, communicator.size).kv_heads(config.num_kv_heads)
    geometry = geometry_of(config)
    num_blocks = KV_BYTES // (geometry.block_bytes // communicator.size)
    with torch.inference_mode():
        model = random_model(config, device, torch.bfloat16, POSITIONS, communicator)
        return RankPart(model, KvCache(num_blocks, geometry, device, heads), POSITIONS)


def lead(
    part: RankPart, communicator: Communicator, others: Connection, reads: float, options: argparse.Namespace
) -> list[Row]:
    """Rank 0's side of one engine's life."""
    writer = PlanWriter(1)
    others.send(writer.addresses[0])
    engine = Engine(part.model, part.kv_cache, POSITIONS, max(BATCHES), Followers(communicator, writer))
    rows = measure(engine, reads, options.batches)
    for row in rows:
        print(f"{row.workload:<28}{row.ms:>10.3f}{row.of_floor:>9.3f}{row.idle:>7.1%}", flush=True)
    if options.profile:
        print(profile(engine), flush=True)
    writer.stop()
    communicator.barrier()
    writer.close()
    return rows


def live(rank: int, url: str, ours: Connection, options: argparse.Namespace) -> None:
    """One rank, from its first meeting to its last."""
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    communicator = meet_on_gpus(Rendezvous(url, rank, 2), device)
    told: dict[str, object] = {"card": torch.cuda.get_device_name(), "peers": isinstance(communicator, Peers)}
    if rank == 0:
        print(
            "the ranks reach each other's memory" if told["peers"] else "the ranks meet through NCCL alone", flush=True
        )
    reads = 0.0
    with torch.inference_mode():
        if isinstance(communicator, Peers):
            nccl = Nccl(Rendezvous(f"{url}-nccl", rank, 2), device)
            told["sums"] = sums(communicator, nccl, HIDDEN, device, options.rows)
            nccl.barrier()
            nccl.close()
        if rank == 0:
            with tempfile.TemporaryDirectory() as folder:
                reads = probe(Table(), Path(folder))
            torch.cuda.empty_cache()
        communicator.barrier()
    began = time.perf_counter()
    part = rank_part(communicator, device)
    torch.cuda.synchronize()
    if rank == 0:
        print(f"weights ready in {time.perf_counter() - began:.1f} s, {part.kv_cache.num_blocks} blocks", flush=True)
        print(f"{'workload':<28}{'ms a step':>10}{'/ floor':>9}{'idle':>7}")
    rows: list[Row] = []
    if rank > 0:
        reader = PlanReader.join(ours.recv(), rank, 2)
        Follower(part.executor(max(BATCHES)), reader, communicator, device).run()
        communicator.barrier()
    else:
        rows = lead(part, communicator, ours, reads, options)
    communicator.close()
    if rank > 0:
        return
    best = rows[0].ms
    print(f"target of one sequence: at most {TARGET_MS} ms: {'met' if best <= TARGET_MS else 'MISSED'}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({**told, "reads": reads, "rows": [asdict(row) for row in rows]}, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sums of few sizes, and one sequence alone")
    parser.add_argument("--profile", action="store_true", help="show which kernels a step is made of")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.rows, options.batches = ((1, 16, 256), ()) if options.quick else (ROWS, BATCHES)
    if torch.cuda.device_count() < 2:
        print("no two NVIDIA GPUs here: nothing to measure")
        return 0
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}")
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = spawn.Pipe()
        ranks = [
            spawn.Process(target=live, args=(rank, f"file://{folder}/meeting", pipes[rank], options), daemon=True)
            for rank in range(2)
        ]
        for rank in ranks:
            rank.start()
        while all(rank.is_alive() for rank in ranks):  # where one fails the other would wait for it
            wait([rank.sentinel for rank in ranks])
            if any(rank.exitcode for rank in ranks):
                break
            for rank in ranks:
                rank.join(60)
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
                rank.join()
    return max(abs(rank.exitcode or 0) for rank in ranks)


if __name__ == "__main__":
    sys.exit(main())
