"""Baton beside transformers on the same machine, in the same run: the engine alone and through the whole cluster.

    python benchmarks/serving.py [--model DIR] [--rounds 3] [--dtype bfloat16] [--json FILE]

What is compared: seconds for N requests, all there at the start, to have all their tokens.
  transformers   `generate` on one left-padded batch (static cache of the library's choice, sdpa attention)
  engine         Baton's engine in this process: prefill in chunks, then decode steps for all that have not finished
  cluster        the same requests as N streams over gRPC: router, prefill worker, KV over Ray, decode worker
Lengths: "equal" is 128 prompt and 128 new tokens each; "spread" draws both from a lognormal of mean 128, at most 512,
with a fixed seed. Each side runs at its best thread count (1 and 2 are tried); rounds are interleaved, the median is
kept. `steps/s`: new tokens of the longest request over the seconds. Greedy, end of sequence ignored.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the cluster helper of the end-to-end tests
CHUNK = 512  # prompt tokens per prefill step
THREADS = (1, 2)  # of torch: each side runs with both, in the cluster for each rank


@dataclass(frozen=True)
class Workload:
    name: str
    prompts: list[list[int]]
    new_tokens: list[int]


Cell = tuple[str, int]  # side, threads
Run = Callable[[Workload], None]


@dataclass(frozen=True)
class Row:
    workload: str
    side: str
    threads: int
    seconds: float
    tokens_per_s: float
    steps_per_s: float
    times_transformers: float


def workloads(vocab: int) -> list[Workload]:
    dice = np.random.default_rng(7)

    def lengths(count: int) -> list[int]:
        sigma = 0.9
        drawn = dice.lognormal(np.log(128) - sigma**2 / 2, sigma, count)
        return np.clip(drawn, 1, 512).astype(int).tolist()

    def prompts(sizes: list[int]) -> list[list[int]]:
        return [dice.integers(300, vocab, size).tolist() for size in sizes]

    made = [Workload(f"{n} equal", prompts([128] * n), [128] * n) for n in (1, 8, 32)]
    return [*made, Workload("32 spread", prompts(lengths(32)), lengths(32))]


def transformers_side(model_dir: Path, dtype: torch.dtype) -> Callable[[Workload], None]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()

    def run(work: Workload) -> None:
        width = max(map(len, work.prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in work.prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in work.prompts])
        longest = max(work.new_tokens)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=longest, min_new_tokens=longest, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        assert out.shape[1] == width + longest

    return run


def engine_side(model_dir: Path, dtype: torch.dtype) -> Callable[[Workload], None]:
    from baton.core.ids import SequenceId
    from baton.core.request import Sampling
    from baton.engine.engine import Engine
    from baton.engine.sequence import Sequence

    engine = Engine.build(model_dir, dtype, torch.device("cpu"), kv_bytes=1 << 29)

    def run(work: Workload) -> None:
        waiting = [
            Sequence(SequenceId(str(i)), prompt, Sampling(max_tokens=new, temperature=0.0))
            for i, (prompt, new) in enumerate(zip(work.prompts, work.new_tokens, strict=True))
        ]
        for seq in waiting:
            engine.start(seq, hold_tokens=len(seq.prompt) + seq.sampling.max_tokens)
        running: list[Sequence] = []
        while waiting:
            chunks, room = [], CHUNK
            for seq in waiting:
                take = min(room, seq.remaining)
                if take:
                    chunks.append((seq, take))
                room -= take
            engine.step(chunks, [])
            running += [seq for seq, _ in chunks if seq.tokens]
            waiting = [seq for seq in waiting if not seq.tokens]
        while running:
            for seq in [seq for seq in running if len(seq.tokens) == seq.sampling.max_tokens]:
                engine.finish(seq)
            running = [seq for seq in running if len(seq.tokens) < seq.sampling.max_tokens]
            if running:
                engine.step([], running)
        engine.ledger.drop_cached()

    return run


def cluster_side(address: str) -> Callable[[Workload], None]:
    import grpc
    import uvloop

    from baton.v1 import inference_pb2 as pb
    from baton.v1 import inference_pb2_grpc

    async def one(stub: inference_pb2_grpc.InferenceServiceAsyncStub, prompt: list[int], new: int) -> int:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.SamplingParams(max_tokens=new, temperature=0, ignore_eos=True),
        )
        count = 0
        async for answer in stub.Generate(request, timeout=600):
            count += sum(len(output.token_ids) for output in answer.outputs)
        return count

    async def all_of(work: Workload) -> list[int]:
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            return await asyncio.gather(*(one(stub, *pair) for pair in zip(work.prompts, work.new_tokens, strict=True)))

    def run(work: Workload) -> None:
        assert uvloop.run(all_of(work)) == work.new_tokens

    return run


def timed(run: Callable[[Workload], None], work: Workload) -> float:
    begin = time.perf_counter()
    run(work)
    return time.perf_counter() - begin


def with_threads(threads: int, run: Run) -> Run:
    def runs(work: Workload) -> None:
        torch.set_num_threads(threads)
        run(work)

    return runs


def measure(cells: dict[Cell, Run], work: Workload, rounds: int) -> dict[Cell, float]:
    """Median seconds of each cell."""
    seconds: dict[Cell, list[float]] = {cell: [] for cell in cells}
    for round_number in range(rounds + 1):
        for cell, run in cells.items():
            took = timed(run, work)
            if round_number:  # the first round warms up
                seconds[cell].append(took)
    return {cell: statistics.median(times) for cell, times in seconds.items()}


def rows_of(work: Workload, seconds: dict[Cell, float]) -> list[Row]:
    best = {side: min((cell for cell in seconds if cell[0] == side), key=seconds.__getitem__) for side, _ in seconds}
    peer = seconds[best["transformers"]]
    return [
        Row(
            workload=work.name,
            side=side,
            threads=cell[1],
            seconds=seconds[cell],
            tokens_per_s=sum(work.new_tokens) / seconds[cell],
            steps_per_s=max(work.new_tokens) / seconds[cell],
            times_transformers=peer / seconds[cell],
        )
        for side, cell in best.items()
    ]


def print_table(rows: list[Row]) -> None:
    print(
        f"\n{'workload':<11} {'side':<13} {'threads':>7} {'seconds':>8} {'tok/s':>8} {'steps/s':>8}"
        f" {'x transformers':>14}"
    )
    for row in rows:
        print(
            f"{row.workload:<11} {row.side:<13} {row.threads:>7} {row.seconds:>8.2f} {row.tokens_per_s:>8.0f}"
            f" {row.steps_per_s:>8.0f} {row.times_transformers:>14.2f}"
        )
    at = {(row.workload, row.side): row.seconds for row in rows}
    for name in ("32 equal", "32 spread"):
        if (name, "cluster") in at:
            print(f"the cluster adds {at[name, 'cluster'] / at[name, 'engine'] - 1:+.0%} to the engine alone at {name}")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    names = ("torch", "transformers", "ray", "grpcio")
    return {
        "commit": commit.stdout.strip(),
        "cpu": next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "?"),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", type=Path, default=ROOT / "models" / "baton-docs-6m")
    flags.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--no-cluster", action="store_true", help="leave the cluster out")
    flags.add_argument("--json", type=Path, help="write the rows and the versions there")
    args = flags.parse_args()

    from transformers import AutoConfig

    works = workloads(AutoConfig.from_pretrained(args.model).vocab_size)
    peer, engine = (side(args.model, getattr(torch, args.dtype)) for side in (transformers_side, engine_side))
    cells: dict[Cell, Run] = {}
    for threads in THREADS:
        cells["transformers", threads] = with_threads(threads, peer)
        cells["engine", threads] = with_threads(threads, engine)
    rows: list[Row] = []
    with ExitStack() as clusters:
        for threads in () if args.no_cluster else THREADS:
            from tests.e2e.cluster import serve

            folder = Path(clusters.enter_context(tempfile.TemporaryDirectory()))
            flags = ("--model", str(args.model), "--dtype", args.dtype, "--threads", str(threads))
            cluster = clusters.enter_context(serve(folder, *flags))
            cells["cluster", threads] = cluster_side(cluster.grpc_address)
        for work in works:
            rows.extend(rows_of(work, measure(cells, work, args.rounds)))
            print(f"measured: {work.name}", flush=True)
    print_table(rows)
    if args.json:
        args.json.write_text(
            json.dumps({**versions(), "dtype": args.dtype, "rows": [asdict(r) for r in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
