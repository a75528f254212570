"""What the host does in one step of a worker, all of it, on a model that computes nothing.

    python -m benchmarks.host_work [--quick] [--roles decode both] [--profile FILE]

A worker's step loop with its rings, in this process. The time of one turn of it is counted: commands and mail in, who
starts, plan, step input, block tables, commit of full blocks to the prefix cache, sampling's bookkeeping, tokens into
the outbox, frames and reports into the ring. Requests come and go: answers have lognormal lengths of mean 128, prompts
16 to 48 tokens, and for each sequence that ends another is admitted, so that the batch stays full. Role `decode` takes
its prompts' KV over from a prefill worker, whose own turns do not count; role `both` computes them in the same steps.
What the router does between two turns does not count.

The model gives prepared logits at once, its vocabulary is small, and attention's index tensors for the CPU are not
made: their time belongs to the device. Look-ahead is on, as on a GPU. Exits 1 when a median misses its gate. With
--profile, the 1,024 sequences run again under cProfile, and what takes longest goes to FILE.
"""

import argparse
import cProfile
import io
import json
import pstats
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from .host_traffic import Traffic
from .machine import ROOT, machine

GATES_MS = {64: 0.6, 256: 1.5, 1024: 5.0}  # at the median
ROLES = ("decode", "both")
WARM_STEPS, STEPS = 200, 600
_PROFILE_LINES = 30


@dataclass(frozen=True)
class Row:
    role: str
    sequences: int
    median_ms: float
    p95_ms: float
    cpu_ms: float  # median of the thread's own time: less than the median where others had the core
    gate_ms: float
    mean_batch: float  # sequences in the batch when a counted step begins
    ended_per_step: float  # as many came

    @property
    def met(self) -> bool:
        return self.median_ms <= self.gate_ms


def measure(role: str, sequences: int, warm: int, steps: int, profile: cProfile.Profile | None = None) -> Row:
    """Turns of the loop, beginning when the batch has been full for `warm` steps."""
    turns, sizes = [], []
    with tempfile.TemporaryDirectory() as folder, Traffic(Path(folder), role, sequences) as traffic:
        while traffic.running < sequences:
            traffic.turn()
        for _ in range(warm):
            traffic.turn()
        before = traffic.ended
        for _ in range(steps):
            sizes.append(traffic.running)
            turns.append(traffic.turn(profile))
        ended = traffic.ended - before
    wall, cpu = np.array(turns).T * 1e3
    return Row(
        role=role,
        sequences=sequences,
        median_ms=float(np.median(wall)),
        p95_ms=float(np.percentile(wall, 95)),
        cpu_ms=float(np.median(cpu)),
        gate_ms=GATES_MS[sequences],
        mean_batch=float(np.mean(sizes)),
        ended_per_step=ended / steps,
    )


def print_row(row: Row) -> None:
    print(
        f"{'pass' if row.met else 'FAIL'}  {row.role:<7} {row.sequences:>5} sequences: median {row.median_ms:6.2f} ms"
        f" (gate {row.gate_ms}, cpu {row.cpu_ms:.2f}), p95 {row.p95_ms:6.2f} ms;"
        f" {row.mean_batch:.0f} in a step, {row.ended_per_step:.2f} ended"
    )


def profiled(role: str, steps: int) -> str:
    """cProfile's table of the functions that take longest themselves. Slower than without: it costs each call."""
    profile = cProfile.Profile()
    measure(role, 1024, WARM_STEPS, steps, profile)
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
    warm, steps = (20, 60) if args.quick else (WARM_STEPS, STEPS)
    rows = []
    for role in args.roles:
        for sequences in GATES_MS:
            rows.append(measure(role, sequences, warm, steps))
            print_row(rows[-1])
            sys.stdout.flush()
    if not args.quick:
        text = json.dumps({**machine("torch"), "rows": [asdict(row) for row in rows]}, indent=1)
        (ROOT / "benchmarks" / "results" / "host-work.json").write_text(text + "\n")
    if args.profile:
        args.profile.write_text("\n".join(profiled(role, 200) for role in args.roles))
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
