"""What the host does in one step of a worker, all of it, on a model that computes nothing.

    python -m benchmarks.host_work [--quick] [--roles decode both] [--profile FILE]

A worker's step loop with its rings, in this process. The time of one turn of it is counted: commands and mail in, who
starts, plan, step input, block tables, commit of full blocks to the prefix cache, sampling's bookkeeping, tokens into
the outbox, frames and reports into the ring. Requests come and go: answers have lognormal lengths of mean 128, prompts
16 to 48 tokens, and for each sequence that ends another is admitted, so that the batch stays full. Role `decode` takes
its prompts' KV over from a prefill worker, whose own turns do not count; role `both` computes them in the same steps.
What the router does between two turns does not count.

The model gives prepared logits at once, its vocabulary is small, and attention's index tensors for the CPU are not
made: their time belongs to the device. Look-ahead is on, as on a GPU.

All kinds of row take turns, round after round, and each round gives a median. The quietest one is judged by the gate:
what else runs on a shared machine only ever adds. Beside it stand the median and p95 of all turns, and how long the
interpreter took for one turn of an empty loop meanwhile, by which machines, and hours of one, can be compared.

Exits 1 when a gate is missed. With --profile, the 1,024 sequences run again under cProfile, and what takes longest goes
to FILE.
"""

import argparse
import cProfile
import io
import json
import pstats
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from .host_traffic import Traffic
from .machine import ROOT, machine

GATES_MS = {64: 0.6, 256: 1.5, 1024: 5.0}  # at the median
ROLES = ("decode", "both")
WARM_STEPS, ROUNDS, STEPS = 100, 12, 60
_PROFILE_LINES = 30
_LOOPS = 20_000


@dataclass(frozen=True)
class Row:
    role: str
    sequences: int
    quietest_ms: float  # the least of the rounds' medians
    median_ms: float  # of all turns
    p95_ms: float
    gate_ms: float
    mean_batch: float  # sequences in the batch when a counted step begins
    ended_per_step: float  # as many came

    @property
    def met(self) -> bool:
        return self.quietest_ms <= self.gate_ms


class Measured:
    """One kind of row, whose batch stays full from round to round."""

    def __init__(self, role: str, sequences: int, traffic: Traffic, warm: int) -> None:
        self.role, self.sequences = role, sequences
        self._traffic = traffic
        self._rounds: list[list[float]] = []
        self._sizes: list[int] = []
        while traffic.running < sequences:
            traffic.turn()
        for _ in range(warm):
            traffic.turn()
        self._before = traffic.ended

    def round(self, steps: int, profile: cProfile.Profile | None = None) -> None:
        turns = []
        for _ in range(steps):
            self._sizes.append(self._traffic.running)
            turns.append(self._traffic.turn(profile) * 1e3)
        self._rounds.append(turns)

    def row(self) -> Row:
        turns = np.concatenate(self._rounds)
        return Row(
            role=self.role,
            sequences=self.sequences,
            quietest_ms=min(float(np.median(part)) for part in self._rounds),
            median_ms=float(np.median(turns)),
            p95_ms=float(np.percentile(turns, 95)),
            gate_ms=GATES_MS[self.sequences],
            mean_batch=float(np.mean(self._sizes)),
            ended_per_step=(self._traffic.ended - self._before) / len(turns),
        )


@contextmanager
def full_batches(kinds: list[tuple[str, int]], warm: int) -> Iterator[list[Measured]]:
    with ExitStack() as stack:
        found = []
        for role, sequences in kinds:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            found.append(Measured(role, sequences, stack.enter_context(Traffic(folder, role, sequences)), warm))
        yield found


def loop_ns() -> float:
    """One turn of an empty loop of the interpreter."""
    begin, total = time.perf_counter(), 0
    for number in range(_LOOPS):
        total += number
    return (time.perf_counter() - begin) / _LOOPS * 1e9


def print_row(row: Row) -> None:
    print(
        f"{'pass' if row.met else 'FAIL'}  {row.role:<7} {row.sequences:>5} sequences: {row.quietest_ms:5.2f} ms in the"
        f" quietest round (gate {row.gate_ms}); all turns: median {row.median_ms:5.2f}, p95 {row.p95_ms:5.2f};"
        f" {row.mean_batch:.0f} in a step, {row.ended_per_step:.2f} ended"
    )


def profiled(role: str, steps: int) -> str:
    """cProfile's table of the functions that take longest themselves. Slower than without: it costs each call."""
    profile = cProfile.Profile()
    with full_batches([(role, 1024)], WARM_STEPS) as (measured,):
        measured.round(steps, profile)
    text = io.StringIO()
    stats = pstats.Stats(profile, stream=text)
    stats.sort_stats("tottime").print_stats(_PROFILE_LINES)
    lines = [
        line.rstrip().replace(f"{ROOT}/src/baton/", "").replace(f"{ROOT}/", "") for line in text.getvalue().split("\n")
    ]
    return f"role {role}, 1024 sequences, {steps} steps\n" + "\n".join(lines).strip() + "\n"


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--roles", nargs="+", choices=ROLES, default=list(ROLES))
    flags.add_argument("--quick", action="store_true", help="few steps, no file")
    flags.add_argument("--profile", type=Path, help="write what takes longest there")
    args = flags.parse_args()
    torch.set_num_threads(1)  # the step loop's thread is all there is
    warm, rounds = (20, 3) if args.quick else (WARM_STEPS, ROUNDS)
    loops = []
    with full_batches([(role, sequences) for role in args.roles for sequences in GATES_MS], warm) as kinds:
        for _ in range(rounds):
            for kind in kinds:
                kind.round(STEPS)
                loops.append(loop_ns())
        rows = [kind.row() for kind in kinds]
    for row in rows:
        print_row(row)
    print(f"an empty loop of the interpreter: {min(loops):.0f} ns a turn at best, median {np.median(loops):.0f}")
    if not args.quick:
        found = {**machine("torch"), "loop_ns": sorted(map(round, loops)), "rows": [asdict(row) for row in rows]}
        (ROOT / "benchmarks" / "results").mkdir(exist_ok=True)
        (ROOT / "benchmarks" / "results" / "host-work.json").write_text(json.dumps(found, indent=1) + "\n")
    if args.profile:
        args.profile.write_text("\n".join(profiled(role, 200) for role in args.roles))
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
