"""Which workers there are: each holds a lease in Redis, routers watch.

    baton:<cluster>:worker:<id>   the record as JSON, with the lease as its time to live
    baton:<cluster>:workers       a set: the ids that may have a record
    baton:<cluster>:changes       pub/sub: an id whose record came, changed or went

Pub/sub is quick but may lose messages, and a lease ends without one: so a watcher also lists everything every few
seconds. While Redis is away the last known fleet stays, and so it does for one lease after Redis is back, until
workers have had the time to register again.
"""

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from ..core.errors import ConfigError, InvalidRequest
from ..core.ids import Epoch, WorkerId
from . import bounds

log = logging.getLogger(__name__)

ROLES = ("prefill", "decode", "both")
TTL_S = 10.0
RELIST_S = 2.0
RETRY_S = 0.5
CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 5.0
_MAX_RECORD_BYTES = 16384
_MAX_WORKERS = 16384

# Removes a record only while it is still ours: a new life of the worker may have written its own.
_UNREGISTER = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('DEL', KEYS[1])
  redis.call('SREM', KEYS[2], ARGV[2])
  redis.call('PUBLISH', KEYS[3], ARGV[2])
end
return 0
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """What a router must know of a worker before it opens a link."""

    worker_id: WorkerId
    epoch: Epoch
    role: str  # one of ROLES
    address: str  # gRPC, "host:port"
    model: str
    fingerprint: str  # of model and KV dtype, as in block keys
    model_fingerprint: str  # of the model alone: workers of equal ones can exchange KV
    max_model_len: int
    vocab_size: int
    dtype: str
    block_tokens: int
    num_blocks: int
    metrics_address: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, data: bytes | str) -> "WorkerRecord":
        """Fields that are unknown here are left out, so that newer workers can tell more. Raises InvalidRequest."""
        if len(data) > _MAX_RECORD_BYTES:
            raise InvalidRequest("a worker's record is too long")
        try:
            known: dict[str, Any] = json.loads(data)
            record = cls(**{field.name: known[field.name] for field in fields(cls)})
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InvalidRequest("a worker's record is malformed") from None
        for field in fields(cls):
            kind = int if field.type in (int, Epoch) else str
            if type(getattr(record, field.name)) is not kind:
                raise InvalidRequest(f"a worker's record has a wrong {field.name}")
        bounds.identifier(record.worker_id, "worker_id")
        bounds.at_most(record.epoch, bounds.MAX_EPOCH, "epoch")
        for name in ("max_model_len", "vocab_size", "block_tokens", "num_blocks"):
            bounds.at_most(getattr(record, name), bounds.MAX_TOKEN_ID, name, least=1)
        if record.role not in ROLES:
            raise InvalidRequest("a worker's record has an unknown role")
        return record


Fleet = Mapping[WorkerId, WorkerRecord]


class Registry:
    """One connection to the registry of one cluster, for a worker that registers or a router that watches."""

    def __init__(self, redis_url: str, cluster_name: str) -> None:
        """Connects to nothing yet. Raises ConfigError for a URL that Redis clients don't take."""
        try:
            self._redis = aioredis.Redis.from_url(
                redis_url,
                socket_connect_timeout=CONNECT_TIMEOUT_S,
                socket_timeout=ANSWER_TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),  # the loops here try again
            )
        except ValueError:
            raise ConfigError("the Redis URL must look like redis://host:port/0, rediss://... or unix://path") from None
        self._prefix = f"baton:{cluster_name}"
        self._record: WorkerRecord | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._refused: dict[str, bytes | str] = {}  # records that made no sense, so that each is logged once
        self.fleet: Fleet = {}
        """The last known fleet, of a registry that watches."""
        self.reachable: bool | None = None
        """Whether Redis answered last time; None: not asked yet."""

    def register(self, record: WorkerRecord, ttl_s: float = TTL_S) -> None:
        """Announces a worker and keeps its lease, from now until `unregister` or `close`. Returns at once."""
        self._record = record
        self._spawn(self._keep(record, ttl_s))

    def watch(self, on_change: Callable[[Fleet], None], relist_s: float = RELIST_S, grace_s: float = TTL_S) -> None:
        """Calls `on_change` with the whole fleet, on the event loop, whenever it differs from the last time. Returns at
        once. `grace_s`: how long after Redis was away missing records are kept; the workers' lease.
        """
        self._spawn(self._follow(on_change, relist_s, grace_s))

    async def unregister(self) -> None:
        """Takes the worker's record back, unless a new life of it registered. Without Redis its lease just ends."""
        record, self._record = self._record, None
        await self._stop()
        if record is None:
            return
        keys = [self._key(record.worker_id), f"{self._prefix}:workers", f"{self._prefix}:changes"]
        try:
            await self._redis.eval(_UNREGISTER, len(keys), *keys, record.to_json(), record.worker_id)
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("the worker could not unregister: %s", type(error).__name__)

    async def close(self) -> None:
        """Stops renewing and watching. A record stays until its lease ends."""
        await self._stop()
        await self._redis.aclose()

    async def _stop(self) -> None:
        while tasks := [task for task in self._tasks if not task.done()]:
            for task in tasks:
                task.cancel()
            # Again after a while: the Redis client may take a cancellation for the end of a time-out of its own.
            await asyncio.wait(tasks, timeout=0.1)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _key(self, worker_id: str) -> str:
        return f"{self._prefix}:worker:{worker_id}"

    async def _keep(self, record: WorkerRecord, ttl_s: float) -> None:
        text = record.to_json()
        while True:
            try:
                async with self._redis.pipeline(transaction=True) as pipe:
                    pipe.get(self._key(record.worker_id))
                    pipe.set(self._key(record.worker_id), text, px=round(ttl_s * 1000))
                    pipe.sadd(f"{self._prefix}:workers", record.worker_id)
                    before = (await pipe.execute())[0]
                if before is None or before.decode(errors="replace") != text:
                    await self._redis.publish(f"{self._prefix}:changes", record.worker_id)
                self._note(True)
                pause = ttl_s / 3
            except (RedisError, OSError, TimeoutError) as error:
                self._note(False, error)
                pause = min(RETRY_S, ttl_s / 3)
            except Exception:  # a bug, ours or the Redis client's, must not end the lease
                log.exception("the worker's record could not be renewed")
                pause = min(RETRY_S, ttl_s / 3)
            await asyncio.sleep(pause)

    async def _follow(self, on_change: Callable[[Fleet], None], relist_s: float, grace_s: float) -> None:
        keep_until = 0.0
        while True:
            try:
                async with self._redis.pubsub(ignore_subscribe_messages=True) as changes:
                    await changes.subscribe(f"{self._prefix}:changes")
                    while True:
                        found = await self._list()
                        self._note(True)
                        now = asyncio.get_running_loop().time()
                        keep_until = now + grace_s if keep_until == math.inf else keep_until
                        if now < keep_until:
                            found = {**self.fleet, **found}
                        if found != self.fleet:
                            self.fleet = found
                            self._tell(on_change)
                        await changes.get_message(timeout=relist_s)
            except (RedisError, OSError, TimeoutError) as error:
                self._note(False, error)
            except Exception:  # a bug, ours or the Redis client's, must not end the watch
                log.exception("the fleet could not be listed")
            keep_until = math.inf  # until a lease after it is back
            await asyncio.sleep(RETRY_S)

    async def _list(self) -> dict[WorkerId, WorkerRecord]:
        members = await cast(Awaitable[set[bytes]], self._redis.smembers(f"{self._prefix}:workers"))
        ids = sorted(member.decode(errors="replace") for member in members)[:_MAX_WORKERS]
        values = await self._redis.mget([self._key(worker_id) for worker_id in ids]) if ids else []
        found: dict[WorkerId, WorkerRecord] = {}
        refused: dict[str, bytes | str] = {}
        gone = []
        for worker_id, value in zip(ids, values, strict=True):
            if value is None:
                gone.append(worker_id)
                continue
            try:
                record = WorkerRecord.from_json(value)
                if record.worker_id != worker_id:
                    raise InvalidRequest("it is of another worker")
                found[record.worker_id] = record
            except InvalidRequest as error:
                refused[worker_id] = value
                if self._refused.get(worker_id) != value:
                    log.warning("the record of worker %r is left out: %s", worker_id, error)
        self._refused = refused
        if gone:  # a worker that comes back adds itself with its next renewal
            await self._redis.srem(f"{self._prefix}:workers", *gone)
        return found

    def _tell(self, on_change: Callable[[Fleet], None]) -> None:
        try:
            on_change(dict(self.fleet))
        except Exception:  # a bug of the caller's must not end the watch
            log.exception("a change of the fleet was not taken")

    def _note(self, reachable: bool, error: Exception | None = None) -> None:
        if error is not None and self.reachable is not False:
            log.warning("Redis is away (%s); the last known fleet stays", type(error).__name__)
        elif reachable and self.reachable is False:
            log.info("Redis is back")
        self.reachable = reachable
