"""The step loop process of a worker that does both."""

from ..kv_transfer.by_pair import ray_transport
from ..kv_transfer.inbox import Inbox
from ..worker.config import WorkerConfig
from ..worker.gang import OtherRanks
from ..worker.rank import MakeTransport, start
from .role import ColocatedRole


def run(
    config: WorkerConfig,
    inbox: Inbox,
    make_transport: MakeTransport = ray_transport,
    others: OtherRanks | None = None,
) -> None:
    """Until the service says stop. Blocks; see worker/config.py. Raises ConfigError for what a person must mend."""
    with start(config, inbox, make_transport, others) as rank:
        rank.run(ColocatedRole(rank.engine, rank.batch, rank.outbox, rank.reporter, rank.limits))
