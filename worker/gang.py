"""How the ranks of one worker find each other, work together and end.

    rank 0       invite -> load its part -> map the others' pools -> lead: every step of its loop is theirs too
    each other   join   -> load its part -> give its pool's handle -> follow, until rank 0 says that it was the last

All are processes of one host. Who starts them, and ends them all when one dies, is cluster/'s to know.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch

from ..core.errors import ConfigError
from ..engine.kv_cache import DTYPES
from ..engine.loading import load_part
from ..engine.parallel.communicator import Communicator, RankLost
from ..engine.parallel.follower import Follower, Followers
from ..engine.parallel.gpus import meet_on_gpus
from ..engine.parallel.plan_channel import PlanReader, PlanWriter
from ..engine.parallel.rendezvous import Rendezvous
from ..engine.parallel.shared_memory import SharedMemory
from ..engine.parallel.shared_pool import PoolHandle
from .config import WorkerConfig


@dataclass(frozen=True, slots=True)
class Invitation:
    """What one rank must know to join rank 0. Good for one life, on this host."""

    rank: int
    meeting: str  # on GPUs a rendezvous's url, on the CPU the shared memory's address
    plans: str  # for PlanReader.join
    kv_bytes: int  # of each rank


class OtherRanks(Protocol):
    """The other ranks of a worker, as rank 0 reaches them while all start."""

    def invite(self, invitations: Sequence[Invitation]) -> None:
        """One for each, in the order of ranks 1, 2, ... They begin to join; waits for nothing."""

    def pools(self) -> Sequence[PoolHandle]:
        """In the same order, once all have loaded. Raises RankLost where one is not there in time."""


@contextmanager
def lead(config: WorkerConfig, others: OtherRanks | None) -> Iterator[Followers | None]:
    """Rank 0's side, from before it loads to its last step. None: it is alone. Raises RankLost, ConfigError.

    An error of the body goes on at once, whatever the others do: they wait for a plan until this process ends.
    """
    assert (config.tp > 1) == (others is not None), (config.tp, others)
    if others is None:
        yield None
        return
    with closing(PlanWriter(config.tp - 1)) as plans, closing(_meeting(config, others, plans)) as communicator:
        yield Followers(communicator, plans)
        with suppress(RankLost):  # at the end nobody misses it
            plans.stop()
            communicator.barrier()


def follow(config: WorkerConfig, invitation: Invitation, loaded: Callable[[PoolHandle], None]) -> None:
    """Another rank's life. `loaded` is told its pool's handle. Raises RankLost when a rank has died, ConfigError for
    what a person must mend."""
    device = torch.device(config.device)
    with (
        closing(PlanReader.join(invitation.plans, invitation.rank, config.tp)) as plans,
        closing(_join(config, invitation)) as communicator,
    ):
        try:
            part = load_part(
                config.model_dir,
                dtype_of(config),
                device,
                invitation.kv_bytes,
                config.block_tokens,
                config.max_model_len,
                config.threads,
                communicator=communicator,
                deterministic=config.deterministic,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        assert part.kv_cache.shared is not None, "a pool that rank 0 can't map"
        loaded(part.kv_cache.shared.handle)
        Follower(part.executor(config.max_batch), plans, communicator, device).run()
        communicator.barrier()


def dtype_of(config: WorkerConfig) -> torch.dtype:
    """Raises ConfigError."""
    if config.dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {config.dtype!r}")
    return DTYPES[config.dtype]


def _meeting(config: WorkerConfig, others: OtherRanks, plans: PlanWriter) -> Communicator:
    """Rank 0's. It invites first: on GPUs to meet is to wait for all."""
    if _on_gpu(config):
        meeting = f"file://{config.ring_dir / config.ring_name}.meeting"  # a folder that only its owner may enter
        others.invite(_invitations(config, meeting, plans))
        return _on_gpus(meeting, 0, config)
    shared = SharedMemory.create(config.tp)
    try:
        others.invite(_invitations(config, shared.address, plans))
    except BaseException:
        shared.close()
        raise
    return shared


def _join(config: WorkerConfig, invitation: Invitation) -> Communicator:
    if _on_gpu(config):
        return _on_gpus(invitation.meeting, invitation.rank, config)
    return SharedMemory.join(invitation.meeting, invitation.rank, config.tp)


def _invitations(config: WorkerConfig, meeting: str, plans: PlanWriter) -> list[Invitation]:
    ranks = range(1, config.tp)
    return [
        Invitation(rank, meeting, address, config.kv_bytes)
        for rank, address in zip(ranks, plans.addresses, strict=True)
    ]


def _on_gpu(config: WorkerConfig) -> bool:
    return torch.device(config.device).type == "cuda"


def _on_gpus(url: str, rank: int, config: WorkerConfig) -> Communicator:
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # its sockets ask nobody who he is
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        return meet_on_gpus(Rendezvous(url, rank, config.tp, meet_s=config.start_timeout_s), device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
