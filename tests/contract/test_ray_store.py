"""The object store, with a small local Ray. The test process has both ends' pools; a mailbox actor per end
stands where a rank's actor would, so that announcements and refs really cross process borders."""

import os
import threading
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from baton.core.ids import Epoch, SequenceId, TicketId
from baton.kv_transfer.inbox import Inbox, deliver
from baton.kv_transfer.messages import Returned
from baton.kv_transfer.pool import BlockPool
from baton.kv_transfer.ray_ranks import NAMESPACE
from baton.kv_transfer.ray_store import RayStoreTransport

from .transport_contract import End, SnapshotContract, fresh_pool

ray = pytest.importorskip("ray")


class _Mailbox:
    """Keeps what peers deliver until the test takes it."""

    def __init__(self) -> None:
        from queue import Queue

        self._queue: Any = Queue()

    def deliver(self, message: Any, handles: Any) -> None:
        self._queue.put((message, handles))

    def take(self) -> Any:
        return self._queue.get(timeout=120)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        namespace=NAMESPACE,
        object_store_memory=100 << 20,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


class _Hung:
    """A rank that takes nothing, and never says so."""

    def deliver(self, message: Any, handles: Any) -> None:
        threading.Event().wait()


class TestRayStore(SnapshotContract):
    carrier = "ray_store"

    def test_a_peer_that_hangs_does_not_delay_what_others_are_told(
        self, ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("baton.kv_transfer.ray_store._ANNOUNCE_S", 600.0)
        source, reader = ends
        name = f"rank-{uuid4().hex}"
        hung = ray.remote(num_cpus=0)(_Hung).options(name=name).remote()
        message = Returned(ticket_id=TicketId("t"), sequence_id=SequenceId("s/0"), source_epoch=Epoch(1))
        reader.transport.tell(name, message)
        reader.transport.tell(source.name, message)
        assert source.next_delivery().message == message
        ray.kill(hung)

    @pytest.fixture
    def ends(self, cluster: None) -> Iterator[tuple[End, End]]:
        kind = ray.remote(num_cpus=0, max_concurrency=4)(_Mailbox)
        made, actors = [], []
        for _ in range(2):
            name, pool, inbox = f"rank-{uuid4().hex}", fresh_pool(), Inbox()
            actor = kind.options(name=name).remote()
            ray.get(actor.__ray_ready__.remote(), timeout=120)  # a busy machine takes long to start one
            actors.append(actor)
            threading.Thread(target=_forward, args=(actor, inbox), daemon=True).start()
            made.append(End(name, pool, RayStoreTransport(BlockPool(pool)), inbox))
        with made[0].transport, made[1].transport:
            yield made[0], made[1]
        for actor in actors:
            ray.kill(actor)


def _forward(actor: Any, inbox: Inbox) -> None:
    """From the mailbox to the inbox, until the actor is gone."""
    while True:
        try:
            message, handles = ray.get(actor.take.remote())
        except Exception:
            return
        deliver(inbox, message, handles)
