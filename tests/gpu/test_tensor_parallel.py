"""One model over two GPUs, as two processes that meet through NCCL, answers as transformers does on one."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from baton.engine.engine import Engine
from baton.engine.loading import load_part
from baton.engine.parallel.follower import Follower, Followers
from baton.engine.parallel.gpus import meet_on_gpus
from baton.engine.parallel.plan_channel import PlanReader, PlanWriter
from baton.engine.parallel.rendezvous import Rendezvous

from ..batch_runs import Way, greedy, run
from ..ranks import Rank, Ranks
from .conftest import VOCABULARY
from .test_engine import NEW_TOKENS, TIE, reference_logits

KV_BYTES = 16 << 20
MAX_BATCH = 32
WAYS = (
    Way(step_tokens=512, join_every=0, lookahead=True),
    Way(step_tokens=64, join_every=2, lookahead=False),
    Way(step_tokens=100, lookahead=True, ballast=2),
    Way(step_tokens=64, join_every=0, lookahead=True, ballast=3, swap_blocks=400),
)


def serve(rank: Rank, path: Path, prompts: list[tuple[int, ...]], meeting: str) -> list[list[list[int]]] | None:
    """Rank 0 answers in every way, the other follows."""
    device = torch.device("cuda", rank.rank)
    torch.cuda.set_device(device)
    with_others = meet_on_gpus(Rendezvous(meeting, rank.rank, rank.size), device)
    if rank.rank > 0:
        plans = PlanReader.join(rank.hear()[rank.rank - 1], rank.rank, rank.size)
        part = load_part(path, torch.float32, device, KV_BYTES, communicator=with_others)
        assert part.kv_cache.shared is not None
        rank.report(part.kv_cache.shared.handle)
        Follower(part.executor(MAX_BATCH), plans, with_others, device).run()
        with_others.barrier()
        return None
    writer = PlanWriter(rank.size - 1)
    rank.tell(writer.addresses)
    followers = Followers(with_others, writer)
    engine = Engine.build(path, torch.float32, device, KV_BYTES, max_batch=MAX_BATCH, followers=followers)
    engine.open_pools(rank.reports())
    answers = []
    for way in WAYS:
        engine.ledger.drop_cached()
        sequences = [greedy(index, prompt, NEW_TOKENS) for index, prompt in enumerate(prompts)]
        counts = run(engine, sequences, way)
        if way.ballast:
            assert (counts.swapped if way.swap_blocks else counts.recomputed) > 0, "nothing was preempted"
        answers.append([seq.tokens for seq in sequences])
    writer.stop()
    with_others.barrier()
    return answers


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"num_key_value_heads": 1}),  # both ranks hold it
        ("Qwen3Moe", {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64}),
    ],
    ids=str,
)
def test_two_gpus_answer_as_the_reference_does(
    family: str, changes: dict[str, int], checkpoint: Callable[..., Path], pair: Ranks, tmp_path: Path
) -> None:
    path, dice = checkpoint(family, **changes), random.Random(0)
    lengths = [1, 2, 15, 16, 17, 33, 100, 350, 700] + [dice.randint(1, 200) for _ in range(15)]
    prompts = [tuple(dice.randrange(2, VOCABULARY) for _ in range(length)) for length in lengths]
    answers, _ = pair.run(serve, 2, path, prompts, f"file://{tmp_path}/meeting")
    for tokens in answers:
        found = [greedy(index, prompt, NEW_TOKENS) for index, prompt in enumerate(prompts)]
        for seq, answer in zip(found, tokens, strict=True):
            seq.tokens += answer
        for seq, logits in zip(found, reference_logits(path, found), strict=True):
            chosen = logits[torch.arange(NEW_TOKENS), seq.tokens]
            assert (logits.max(-1).values - chosen < TIE).all(), seq.sequence_id
