"""How one worker is set up, and how its processes start.

A worker is, on one host, a service process and a rank process, or several, each with a part of the model. cluster/
starts all with the same WorkerConfig:

- the rank: `run(config, inbox)` of prefill_worker/rank.py, decode_worker/rank.py or colocated_worker/rank.py, in a
  thread of a process that serves no gRPC. It makes the ring's files in `ring_dir`, loads the model (progress goes over
  the ring), and steps until the service says stop. An error that it raises ends this life of the worker. Beside it,
  calls of peer ranks do `kv_transfer.inbox.deliver(inbox, message, handles)` and `kv_transfer.inbox.greet(inbox,
  record)` with the same `Inbox()`: the rank is a Ray actor named `config.inbox` in the namespace "baton" whose methods
  `deliver(message, handles)` and `greet(record)` do just that.
- each other rank: `worker.gang.follow(config, invitation, loaded)`, with what the first one gave for it to `others`. It
  follows the first one's steps until that one says stop; an error of any of them ends this life of the worker.
- the service: `await worker.service.serve(config, stop, ready, progress)`, in an asyncio process. It waits for the
  ring's files, then for the rank, then registers and serves until `stop` is set; WorkerLost when the rank dies.

Both are for one life: whoever restarts them takes a new epoch, and so new names for ring and inbox.
"""

from dataclasses import dataclass
from pathlib import Path

from ..core.ids import Epoch, WorkerId

ROLES = ("prefill", "decode", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    worker_id: WorkerId
    epoch: Epoch
    role: str  # one of ROLES
    model_dir: Path
    model_name: str  # as clients call it
    dtype: str = "bfloat16"  # or "float32"
    device: str = "cpu"  # as torch names it
    tp: int = 1  # tensor-parallel ranks
    kv_bytes: int = 1 << 28  # of each rank
    block_tokens: int = 16
    max_model_len: int | None = None  # None: what the model's configuration says
    max_batch: int = 64  # sequences in a step
    step_tokens: int = 512  # of one step, prompts' chunks among them
    policy: str = "hybrid"  # who goes first, and who gives blocks back: see engine/policies.py
    swap_bytes: int = 0  # host memory for KV of preempted sequences
    max_waiting: int = 1024  # admitted sequences that hold nothing yet
    threads: int | None = 1  # of torch on the CPU
    deterministic: bool = False  # logits do not depend on what else is in a step, to the last bit
    transport: str = "auto"  # what may carry KV between workers: see kv_transfer/capability.py
    kv_checksums: bool = True  # of blocks that are lent
    lease_s: float = 20.0  # lent blocks, after the last piece
    handover_timeout_s: float = 60.0  # how long reserved blocks wait for pieces, and a computed prompt for its ticket
    drain_timeout_s: float = 60.0
    start_timeout_s: float = 600.0  # until the rank has loaded the model
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    metrics_port: int = 0
    redis_url: str
    cluster_name: str = "baton"
    cluster_token: str = ""
    otlp_endpoint: str | None = None
    log_format: str = "console"  # or "json"
    tls_certificate: Path | None = None  # with tls_key: TLS on the port
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # callers must show a certificate signed by it
    ring_dir: Path = Path("/dev/shm/baton")  # noqa: S108 (shared memory; made with mode 0700)
    ring_name: str
    inbox: str  # where peers' ranks find ours
