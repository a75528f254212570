"""What a cluster adds to its engine: the same jobs through the engine alone and as streams over gRPC, in the same run.

    python -m benchmarks.serving [--rounds 3] [--dtype float32] [--model DIR]

Beside the engine of benchmarks/engine.py, clusters on this machine, each with its own Ray: router, prefill worker, KV
over a transport, decode worker ("apart"), and router with one worker that does both ("together"). Clusters run with one
and with two torch threads a rank, and the better counts. Writes results/serving-cpu.json.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .machine import ROOT, faster_dtype, machine
from .measure import Result, compare
from .report import print_results
from .sides import Baton, Serve, Side, Times, Variant
from .workloads import Job, Workload, served

sys.path.insert(0, str(ROOT))  # the cluster helper of the end-to-end tests
MOST = 512
LAYOUTS = {"apart": ("--prefill", "1", "--decode", "1"), "together": ("--both", "1")}


class Streams:
    """All jobs of a wave as streams of an asyncio client. Its clusters run from the start: one per thread count."""

    def __init__(self, name: str, addresses: dict[int, str]) -> None:
        self.name = f"cluster, {name}"
        self._addresses = addresses

    def variants(self, work: Workload) -> list[Variant]:
        return [Variant(1)]

    @contextmanager
    def open(self, variant: Variant, work: Workload) -> Iterator[Serve]:
        import uvloop

        yield lambda jobs: uvloop.run(_stream_all(self._addresses[variant.threads], jobs))


async def _stream_all(address: str, jobs: tuple[Job, ...]) -> Times:
    import grpc

    from baton.v1 import inference_pb2_grpc

    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        begin = time.perf_counter()
        return await asyncio.gather(*(_stream(stub, job, begin) for job in jobs))


async def _stream(stub: Any, job: Job, begin: float) -> np.ndarray:
    from baton.v1 import inference_pb2 as pb

    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=job.prompt),
        sampling=pb.SamplingParams(max_tokens=job.new_tokens, temperature=0, ignore_eos=True),
    )
    times: list[float] = []
    async for answer in stub.Generate(request, timeout=600):
        now = time.perf_counter() - begin
        times += [now] * sum(len(output.token_ids) for output in answer.outputs)
    assert len(times) == job.new_tokens, (len(times), job.new_tokens)
    return np.array(times)


def print_overheads(results: list[Result]) -> None:
    rates = {(one.workload, one.side): one.tokens_per_s for one in results}
    for (work, side), rate in rates.items():
        if side != Baton.name:
            print(f"{work}: {side} adds {rates[work, Baton.name] / rate - 1:+.0%} to the engine's time")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", type=Path, default=ROOT / "models" / "baton-docs-6m")
    flags.add_argument("--dtype", choices=["bfloat16", "float32"], help="the faster one here if not given")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    flags.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    args = flags.parse_args()

    from tests.e2e.cluster import serve

    dtype = args.dtype or faster_dtype()
    baton = Baton(args.model, getattr(torch, dtype))
    results: list[Result] = []
    with ExitStack() as stack:
        sides: list[Side] = [baton]
        for layout in args.layouts:
            addresses = {}
            for threads in args.threads:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                settings = ("--model", str(args.model), "--dtype", dtype, "--threads", str(threads), *LAYOUTS[layout])
                addresses[threads] = stack.enter_context(serve(folder, *settings)).grpc_address
            sides.append(Streams(layout, addresses))
        for work in served(baton.engine.config.vocab_size, (1, 32), MOST):
            results += compare(sides, work, tuple(args.threads), args.rounds)
            print_results(results[-len(sides) :], head=len(results) == len(sides))
    print_overheads(results)
    text = json.dumps(
        {**machine("torch", "ray", "grpcio"), "dtype": dtype, "results": [asdict(one) for one in results]}
    )
    (ROOT / "benchmarks" / "results" / "serving-cpu.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
