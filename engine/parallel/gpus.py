"""How ranks with a GPU each find each other: two that reach each other's memory are `Peers`, else all is NCCL's."""

import logging

import torch

from ...kernels.build import BuildError, cuda_library
from ...kernels.device_wait import settle
from ...kernels.mailbox import MAILBOX_BYTES, Mailbox, Pair
from .communicator import Communicator, RankLost
from .nccl import Nccl
from .peers import Peers
from .rendezvous import Rendezvous
from .shared_pool import CudaPoolHandle, SharedPool, open_pool

_log = logging.getLogger(__name__)


def meet_on_gpus(rendezvous: Rendezvous, device: torch.device) -> Communicator:
    """All ranks call it. Raises as `Nccl` does, ValueError also where nvcc fails."""
    try:
        library = cuda_library(device)  # compiled now if it must be, while nobody waits
    except BuildError as error:
        raise ValueError(str(error)) from error
    nccl = Nccl(rendezvous, device)
    if nccl.size != 2:
        return nccl
    own = SharedPool.create((MAILBOX_BYTES,), torch.uint8, device)
    assert isinstance(own.handle, CudaPoolHandle), own.handle
    settle(device)  # zeros before the other can write
    handles = nccl.exchange("mailbox", own.handle.to_text())
    try:
        there = open_pool(own.handle.of_peer(handles[1 - nccl.rank]), device)
    except RankLost as error:
        _log.warning("%s: decode steps meet by way of NCCL, and are no graphs", error)
        there = None
    if nccl.exchange("mapped", str(there is not None and library is not None)) != ["True", "True"]:  # both or none
        return nccl
    assert there is not None
    return Peers(Pair(nccl.rank, Mailbox(own.tensor), Mailbox(there)), nccl)
