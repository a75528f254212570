"""How long two ranks of this host take to meet, and to hand a step's plan on.

    PYTHONPATH=src python -P benchmarks/tensor_parallel.py [--rounds 2000]

Both processes run on the CPU with one torch thread. Shared memory and gloo take turns in the same run. Each p50 is that
of the quietest turn, each p99 that of all: where other work has the cores too, the two lie far apart. A plan's time is
from before `to_bytes` in one rank until after `from_bytes` in the other, by the clock that they share.
"""

import argparse
import multiprocessing
import socket
import statistics
import struct
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import torch

from baton.engine.parallel.communicator import Communicator
from baton.engine.parallel.gloo import Gloo
from baton.engine.parallel.plan_channel import PlanReader, PlanWriter
from baton.engine.parallel.rendezvous import Rendezvous
from baton.engine.parallel.shared_memory import SharedMemory
from baton.engine.step_input import StepInput

HIDDEN, BATCHES, PLAN_ROWS = (288, 4096), (1, 8, 64), (64, 256)
TURNS = 10  # of each communicator, alternating
PAUSE_S = 300e-6  # between plans: a step's other work, in which the reader waits for the next


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """p50 of the quietest turn, p99 of all, in microseconds."""
    turn = max(1, len(seconds) // TURNS)
    p50 = min(statistics.median(seconds[at : at + turn]) for at in range(0, len(seconds) - turn + 1, turn))
    return p50 * 1e6, sorted(seconds)[len(seconds) * 99 // 100] * 1e6


def timed(work: Callable[[], object], rounds: int) -> list[float]:
    found = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return found


def all_reduces(peers: dict[str, Communicator], rounds: int) -> None:
    """Both ranks run this; the first prints."""
    for hidden in HIDDEN:
        for batch in BATCHES:
            x = torch.zeros(batch, hidden)
            found: dict[str, list[float]] = {name: [] for name in peers}
            for _ in range(TURNS):
                for name, peer in peers.items():
                    peer.barrier()
                    timed(lambda: peer.all_reduce(x), 20)  # noqa: B023 # called at once
                    found[name] += timed(lambda: peer.all_reduce(x), rounds // TURNS)  # noqa: B023
            if peer.rank == 0:
                (p50, p99), (gloo50, gloo99) = (percentiles(found[name]) for name in ("shared memory", "gloo"))
                shape = f"all-reduce [{batch}, {hidden}] float32"
                print(
                    f"{shape:<36}{p50:>9.0f}{p99:>9.0f}{gloo50:>12.0f}{gloo99:>9.0f}{gloo50 / p50:>9.1f}x", flush=True
                )


def a_plan(rows: int, step: int) -> StepInput:
    """A decode step in full flight: every sixteenth row opens a block. Carries when it was made."""
    changes, none = rows // 16, np.empty(0, np.int64)
    made_at = np.frombuffer(struct.pack("=d", time.perf_counter()), np.int64)
    return StepInput(
        copy_from=none,
        copy_to=none,
        table_at=np.arange(changes) * 64,
        table_blocks=np.arange(changes, dtype=np.int32),
        token_rows=none,
        token_ids=made_at,
        decode_rows=np.arange(rows),
        positions=np.full(rows, step),
        slots=np.arange(rows),
        chunk_rows=none,
        chunk_starts=none,
        chunk_counts=none,
        chunk_ids=none,
        wanted=np.arange(rows),
        sampled_rows=np.arange(rows),
    )


def write_plans(writer: PlanWriter, rounds: int) -> None:
    for rows in PLAN_ROWS:
        for step in range(rounds):
            writer.put(a_plan(rows, step))
            until = time.perf_counter() + PAUSE_S
            while time.perf_counter() < until:
                pass
    writer.stop()


def read_plans(reader: PlanReader) -> dict[int, list[float]]:
    """Seconds on the way, by rows."""
    found: dict[int, list[float]] = {rows: [] for rows in PLAN_ROWS}
    while (step := reader.take()) is not None:
        (made_at,) = struct.unpack("=d", step.token_ids.tobytes())
        found[len(step.decode_rows)].append(time.perf_counter() - made_at)
    return found


def follow(connection: Connection, rounds: int) -> None:
    torch.set_num_threads(1)
    url, address, plans = connection.recv()
    reader = PlanReader.join(plans, 1, 2)
    shared = SharedMemory.join(address, 1, 2)
    all_reduces({"shared memory": shared, "gloo": Gloo(Rendezvous(url, 1, 2), "127.0.0.1")}, rounds)
    connection.send(read_plans(reader))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000, help="meetings of each kind (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few meetings")
    args = parser.parse_args()
    rounds = 100 if args.quick else args.rounds
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other = context.Process(target=follow, args=(theirs, rounds), daemon=True)
    other.start()
    shared, writer = SharedMemory.create(2), PlanWriter(1)
    ours.send((url, shared.address, writer.addresses[0]))
    gloo = Gloo(Rendezvous(url, 0, 2), "127.0.0.1")
    print(f"{'microseconds':<36}{'p50':>9}{'p99':>9}{'gloo p50':>12}{'p99':>9}{'times':>10}")
    all_reduces({"shared memory": shared, "gloo": gloo}, rounds)
    write_plans(writer, rounds)
    for rows, seconds in ours.recv().items():
        p50, p99 = percentiles(seconds)
        print(f"{f'plan of {rows} rows':<36}{p50:>9.0f}{p99:>9.0f}")
    other.join()


if __name__ == "__main__":
    main()
