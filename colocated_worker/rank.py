"""The step loop process of a worker that does both."""

from ..kv_transfer.inbox import Inbox
from ..kv_transfer.ray_store import RayStoreTransport
from ..worker.config import WorkerConfig
from ..worker.gang import Gang
from ..worker.rank import MakeTransport, start
from .role import ColocatedRole


def run(
    config: WorkerConfig, inbox: Inbox, make_transport: MakeTransport = RayStoreTransport, gang: Gang | None = None
) -> None:
    """Until the service says stop. Blocks; see worker/config.py. Raises ConfigError for what a person must mend."""
    with start(config, inbox, make_transport, gang) as rank:
        rank.run(ColocatedRole(rank.engine, rank.batch, rank.outbox, rank.reporter, rank.limits))
