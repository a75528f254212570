"""Baton's engine beside transformers in both of its ways, in the same run: static and continuous batching.

    python -m benchmarks.engine [--quick] [--rounds 3] [--dtype float32] [--model DIR]

Jobs arrive together, 1, 16 and 64 at a time (eight one by one for 1); their prompts and answers have lognormal lengths
of mean 128, at most 1,024 ("spread"), or 128 tokens each ("equal"). Answers have exactly the tokens asked for, chosen
greedily. All sides use the dtype that the processor multiplies faster, and each runs at the best of its variants: one
or two threads, and for the peers how many sequences at once. tok/s counts the tokens asked for; first: milliseconds
from the arrival of all to a job's first token; next: milliseconds between two tokens of a job. Writes
results/engine-cpu.json and engine-cpu.svg; exits 1 on a missed target.
"""

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from .machine import ROOT, faster_dtype, machine
from .measure import Result, compare
from .report import chart, print_results, print_shared, print_targets, targets
from .shared_prompt import Shared, shared_prompt
from .sides import Baton, ContinuousBatches, Side, StaticBatches, load_peer
from .workloads import MOST, Dice, served

RESULTS = ROOT / "benchmarks" / "results"
WIDTHS, QUICK_WIDTHS = (1, 16, 64), (1, 4)


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", type=Path, default=ROOT / "models" / "baton-docs-6m")
    flags.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="of all sides; the faster one here if not given"
    )
    flags.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="each side at its best of these")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--quick", action="store_true", help="short jobs, one thread, one round, no file")
    args = flags.parse_args()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # misses psutil

    dtype = args.dtype or faster_dtype()
    about = machine("torch", "transformers")
    title = f"{dtype}, {about['cpu']}, {about['cores']} cores"
    print(title)
    threads, rounds = ((1,), 1) if args.quick else (tuple(args.threads), args.rounds)
    results, shared, most = measure(args.model, getattr(torch, dtype), threads, rounds, args.quick)
    print_shared(shared)
    found = targets(results, shared)
    print_targets(found)
    if args.quick:
        return 0
    rows = {"results": [asdict(one) for one in results], "shared": [asdict(one) for one in shared]}
    text = json.dumps({**about, "dtype": dtype, "longest": most, **rows}, indent=1)
    (RESULTS / "engine-cpu.json").write_text(text + "\n")
    chart(RESULTS / "engine-cpu.svg", results, title)
    return 0 if all(one.met for one in found) else 1


def measure(
    model_dir: Path, dtype: torch.dtype, threads: tuple[int, ...], rounds: int, quick: bool
) -> tuple[list[Result], list[Shared], int]:
    """(each workload's results, those of shared prompts, the bound of prompt and of answer tokens)."""
    baton = Baton(model_dir, dtype)
    peers = StaticBatches(load_peer(model_dir, dtype)), ContinuousBatches(load_peer(model_dir, dtype))
    sides: list[Side] = [baton, *peers]
    vocab, context = baton.engine.config.vocab_size, baton.engine.config.max_position_embeddings
    most = 64 if quick else min(MOST, context // 2)
    results: list[Result] = []
    for work in served(vocab, QUICK_WIDTHS if quick else WIDTHS, most):
        found = compare(sides, work, threads, rounds)
        print_results(found, head=not results)
        results += found
    lengths = (512,) if quick else (most, context - 256)
    return results, [shared_prompt(baton, Dice(vocab), tokens, threads[0]) for tokens in lengths], most


if __name__ == "__main__":
    sys.exit(main())
