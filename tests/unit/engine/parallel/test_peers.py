"""Two ranks that meet in each other's memory, on the kernels for a GPU, run on the CPU (see tests/emulation).

A capture is the function, called again; so both ranks replay, or a meeting would not end.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.engine.engine import Engine
from baton.engine.executor import Executor
from baton.engine.loading import load_part
from baton.engine.models.safetensors_file import SafetensorsDir
from baton.engine.parallel.communicator import Communicator
from baton.engine.parallel.follower import Follower, Followers, Leader
from baton.engine.parallel.peers import Peers, add_rms_norm, can_be_captured
from baton.engine.parallel.plan_channel import PlanReader, PlanWriter
from baton.engine.parallel.shared_pool import CudaPoolHandle, SharedPool, open_pool
from baton.kernels import peer_sum
from baton.kernels.mailbox import MAILBOX_BYTES, Mailbox, Pair

from ....emulation import library as emulation
from ....ranks import Rank, Ranks
from ..test_decode_graphs import Capture, an_engine, answers

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=f"emulation: {emulation.missing()}")

CPU = torch.device("cpu")
MAX_BATCH, MAX_LEN = 9, 256
LENGTHS = [1, 15, 16, 17, 40, 3, 90, 33, 16, 2, 31]


def on_kernels(patch: pytest.MonkeyPatch) -> None:
    emulation.use(emulation.compile_for_cpu(), patch)
    read = SafetensorsDir.read  # gives memory of the file itself, which begins where no vector does
    patch.setattr(SafetensorsDir, "read", lambda *arguments: read(*arguments).clone())


def meet(rank: Rank) -> Peers:
    """What the kernels are not for goes through shared memory."""
    rest = rank.meet()
    own = SharedPool.create((MAILBOX_BYTES,), torch.uint8, CPU)
    if rank.rank == 0:
        rank.tell(own.handle)
        (handle,) = rank.reports()
    else:
        rank.report(own.handle)
        handle = rank.hear()
    peers = Peers(Pair(rank.rank, Mailbox(own.tensor), Mailbox(open_pool(handle, CPU))), rest)
    rest.barrier()  # both have it open
    own.close()
    return peers


def meetings(rank: Rank, rest_beyond: int) -> dict[str, Any]:
    """Each, of tensors that the kernels are for and of others."""
    with pytest.MonkeyPatch.context() as patch:
        on_kernels(patch)
        patch.setattr(peer_sum, "INBOX_BYTES", rest_beyond)
        peers = meet(rank)
        found: dict[str, Any] = {}
        for shape in ((2, 8), (3, 5), (40, 8), (0, 8)):
            own = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape) + 100 * rank.rank
            stream, weight = own.new_full(shape, 3.0), own.new_full(shape[1:], 2.0)
            normed = add_rms_norm(peers, own.clone(), stream, weight, 1e-5)
            gathered = peers.gather_last(own)
            found[str(shape)] = (peers.all_reduce(own.clone()), stream, normed, gathered, peers.broadcast(own.long()))
        peers.barrier()
        peers.close()
        peers.close()
        return found


def test_meetings_give_what_they_say(ranks: Ranks) -> None:
    emulation.compile_for_cpu()
    first, second = ranks.run(meetings, 2, 1 << 10)
    for name, of_first in first.items():
        rows, width = map(int, name.strip("()").split(","))
        zero = torch.arange(rows * width, dtype=torch.float32).view(rows, width)
        total, beside = 2 * zero + 100, torch.cat((zero, zero + 100), 1)
        stream = total + 3
        normed = 2 * stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + 1e-5)
        none = torch.empty(rows, 0)
        for gathered, found in ((beside, of_first), (none, second[name])):
            for value, expected in zip(found, (total, stream, normed, gathered, zero.long()), strict=True):
                torch.testing.assert_close(value, expected)


def serve(rank: Rank, path: Path, few_bytes: int) -> list[list[int]] | int:
    """Rank 0's answers; of the other how many graphs it replayed."""
    with pytest.MonkeyPatch.context() as patch:
        on_kernels(patch)
        patch.setattr(peer_sum, "FEW_BYTES", few_bytes)
        peers, capture = meet(rank), Capture()
        part = load_part(path, torch.float32, CPU, 3 << 20, max_model_len=MAX_LEN, communicator=peers)
        with torch.inference_mode():
            part.kv_cache.pool.fill_(float("nan"))  # what is read and was not written shows
            executor = Executor(part.model, part.kv_cache, MAX_BATCH, MAX_LEN // 16, capture)
        if rank.rank > 0:
            Follower(executor, PlanReader.join(rank.hear()[0], 1, 2), peers, CPU).run()
            peers.barrier()
            return capture.replayed
        writer = PlanWriter(1)
        rank.tell(writer.addresses)
        followers = Followers(peers, writer)
        engine = Engine(part.model, part.kv_cache, part.max_model_len, MAX_BATCH, followers)
        engine.executor = Leader(executor, followers)
        found = answers(engine, LENGTHS)
        writer.stop()
        peers.barrier()
        return found


@pytest.mark.parametrize(
    ("few_bytes", "changes"),
    [
        (4 << 10, {}),
        (1 << 20, {"num_key_value_heads": 1, "vocab_size": 213, "attention_bias": True, "mlp_bias": True}),
    ],
    ids=str,
)
def test_two_ranks_replay_the_same_graphs_and_answer_like_one(
    few_bytes: int,
    changes: dict[str, Any],
    checkpoint: Callable[..., Path],
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = checkpoint("Llama", head_dim=64, **changes)
    on_kernels(monkeypatch)
    found, replayed = ranks.run(serve, 2, path, few_bytes)
    assert replayed > 5
    assert found == answers(an_engine(path, torch.float32, MAX_BATCH, None), LENGTHS)


def test_a_step_is_captured_where_all_its_meetings_are_those_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    on_kernels(monkeypatch)
    boxes = [Mailbox(torch.zeros(MAILBOX_BYTES, dtype=torch.uint8)) for _ in range(2)]

    class Rest:
        rank, size = 0, 2

    rest: Communicator = Rest()  # type: ignore[assignment]
    peers = Peers(Pair(0, *boxes), rest)
    assert can_be_captured(peers, 512, 8192, torch.bfloat16)
    assert not can_be_captured(peers, 512, 1 << 15, torch.bfloat16)
    assert not can_be_captured(peers, 512, 100, torch.bfloat16)  # rows of no whole vectors
    assert not can_be_captured(rest, 512, 8192, torch.bfloat16)


def test_a_handle_goes_as_text() -> None:
    size, stride = torch.Size([8]), (1,)
    first, second = (
        CudaPoolHandle(
            (
                *(torch.Tensor, size, stride, 3 * at, torch.UntypedStorage, torch.uint8, at),
                *(b"name" * at, 8 << at, 64 * at, False, b"counter" * at, at, b"event" * at, at == 1),
            )
        )
        for at in (1, 2)
    )
    there = second.of_peer(first.to_text())
    assert [*there.arguments[:6], *there.arguments[7:]] == [*first.arguments[:6], *first.arguments[7:]]
    assert type(there.arguments[14]) is bool
