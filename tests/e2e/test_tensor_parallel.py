"""Workers of two ranks: the answers stay those of transformers, and a worker ends and starts again as one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import torch

from baton.v1 import inference_pb2_grpc

from ..near_ties import NearTies
from .cluster import Cluster, serve
from .conftest import MODEL
from .ledgers import assert_clean, workers
from .processes import with_command
from .test_colocated import AT_ONCE, NEW_TOKENS, TIGHT, ask, crowd, preemptions
from .test_equality import compare, generate, prompts, reference
from .test_lifecycle import answers, until
from .test_trace import carried_by, carried_ways, settled


def flags_of(device: str, num_ranks: int) -> list[str]:
    if device == "cuda" and torch.cuda.device_count() < num_ranks:
        pytest.skip(f"each of {num_ranks} ranks needs a GPU of its own")
    return ["--model", str(MODEL), "--dtype", "float32", "--device", device]


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory, device: str) -> Iterator[Cluster]:
    with serve(tmp_path_factory.mktemp("apart"), *flags_of(device, 4), "--tp", "2") as running:
        yield running


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, device: str) -> Iterator[Cluster]:
    """One worker that does both, whose blocks run out."""
    flags = [*flags_of(device, 2), "--tp", "2", "--both", "1", *TIGHT]
    with serve(tmp_path_factory.mktemp("together"), *flags) as running:
        yield running


def test_greedy_tokens_of_two_ranks_equal_those_of_transformers_when_prefill_and_decode_are_apart(
    apart: Cluster,
) -> None:
    chosen = range(1, 50, 4)
    prompts()  # here, as transformers does not like to be imported by several threads at once
    with grpc.insecure_channel(apart.grpc_address) as channel, ThreadPoolExecutor(6) as pool:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        found = list(pool.map(lambda index: generate(stub, index), chosen))
    near_ties = NearTies()
    for index, tokens in zip(chosen, found, strict=True):
        compare(near_ties, index, prompts()[index], tokens, reference(index))
    near_ties.report("two ranks, prefill and decode apart", most=1)
    assert_clean(apart)


def test_blocks_that_two_ranks_hold_move_the_fastest_way_that_there_is(apart: Cluster, device: str) -> None:
    near_ties, index = NearTies(), 2
    with grpc.insecure_channel(apart.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        settled(apart, stub, device)
        compare(near_ties, index, prompts()[index], generate(stub, index), reference(index))
    near_ties.report("two ranks, prefill and decode apart, after they have met", most=1)
    assert carried_ways(apart) == {carried_by(device)}
    assert_clean(apart)


def test_answers_of_two_ranks_that_were_swapped_out_equal_those_of_transformers(together: Cluster) -> None:
    asked, expected = crowd()
    before = preemptions(together)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda prompt: ask(together, prompt, temperature=0, max_tokens=NEW_TOKENS), asked))
    swapped = preemptions(together)["swap"] - before["swap"]
    near_ties = NearTies()
    for number, answer in enumerate(zip(asked, found, expected, strict=True)):
        compare(near_ties, number, *answer)
    near_ties.report(f"two ranks, {swapped:.0f} swapped out", most=1)
    assert swapped > 0
    assert_clean(together)


@pytest.mark.parametrize("kind", ["FollowerActor", "RankActor"])
def test_when_any_rank_is_killed_all_end_and_the_worker_comes_back_under_a_new_epoch(
    together: Cluster, kind: str
) -> None:
    (before,) = workers(together).values()
    ranks = [pid for name in ("RankActor", "FollowerActor") for pid in with_command(name) if of(together, pid)]
    assert len(ranks) == 2
    victim = next(pid for pid in ranks if pid in with_command(kind))
    os.kill(victim, signal.SIGKILL)
    until(lambda: any(record.epoch != before.epoch for record in workers(together).values()), 90)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), 30)
    until(lambda: answers(together), 60)
    assert_clean(together)


def of(cluster: Cluster, pid: int) -> bool:
    """It is of this cluster, not of another that runs beside it."""
    try:
        return cluster.token.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has just ended, or is another user's
        return False
