"""What can be known to go wrong before anything starts: ports, memory, the model's kind. Each error is one line."""

import errno
import importlib.util
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from ..engine.memory import cpu_kv_bytes, default_swap_bytes
from . import memory_plan
from .checkpoint import read_json, weight_files
from .config import ServeConfig
from .memory_plan import WIDTHS
from .model_shape import read_attention, read_shape, stored_dtype
from .units import format_size

_PROCESS_BYTES = 450 << 20  # a worker without weights and KV: interpreter, torch, gRPC (measured: 280 + 120 MiB)
_RANK_BYTES = 280 << 20  # a rank more
_BASE_BYTES = 900 << 20  # Ray, router, Redis (measured: 670 + 150 MiB)
_LAST_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What a model takes, read from its files alone."""

    max_position_embeddings: int
    dtype: str  # that it runs in
    tp: int = 1
    rank_weight_bytes: int  # in that dtype, of the fullest rank
    kv_bytes_per_token: int  # in all ranks together
    head_bytes: int = 0  # of a head that is the embedding too: a CPU lays it out a second time

    @property
    def weight_bytes(self) -> int:
        """In all ranks together."""
        return self.tp * self.rank_weight_bytes


def check_installed() -> None:
    """Raises ConfigError unless the worker extra is there."""
    for module in ("ray", "torch"):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"`baton serve` needs {module}: pip install 'baton-llm[worker]'.")


def check_ports(config: ServeConfig) -> None:
    """Raises ConfigError when other processes listen on ours: it names all of them, and flags that would work."""
    ports = {flag: getattr(config, flag) for flag in ("grpc_port", "http_port", "metrics_port")}
    taken = [flag for flag, port in ports.items() if not _is_free(config.host, port, flag)]
    if not taken:
        return
    numbers = [str(ports[flag]) for flag in taken]
    named = f"Port {numbers[0]} is" if len(taken) == 1 else f"Ports {', '.join(numbers[:-1])} and {numbers[-1]} are"
    chosen = set(ports.values())
    for flag in taken:
        ports[flag] = next(
            port
            for port in (*range(ports[flag] + 1, _LAST_PORT + 1), *range(1024, ports[flag]))
            if port not in chosen and _is_free(config.host, port, flag)
        )
        chosen.add(ports[flag])
    flags = " ".join(f"{_flag(flag)} {port}" for flag, port in ports.items())
    raise ConfigError(f"{named} taken: stop what listens there, or add {flags}")


def _is_free(host: str, port: int, flag: str) -> bool:
    """Raises ConfigError for what no other port would mend."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: a connection that lingers after the last run does not count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror:
            raise ConfigError(f"--host {host} is no address of this machine.") from None
        except PermissionError:
            raise ConfigError(f"Port {port} is for root alone: choose one from 1024 on with {_flag(flag)}.") from None
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ConfigError(f"--host {host} is no address of this machine.") from None
            return False
    return True


def measure_model(directory: Path, dtype: str, tp: int = 1) -> ModelSize:
    """Read config.json and the sizes of the weights. Raises ConfigError for what is not a decoder-only checkpoint, or
    does not split over `tp` ranks."""
    kind = ""
    try:
        config = read_json(directory / "config.json")
        kind = f" ({', '.join(map(str, config.get('architectures') or ['it names no architecture']))})"
        attention = read_attention(config)
        longest = int(config["max_position_embeddings"])
    except (ConfigError, ValueError, KeyError, TypeError) as error:
        reason = str(error).rstrip(".") if isinstance(error, ConfigError) else repr(error)
        raise ConfigError(
            f"{directory / 'config.json'}{kind} is not that of a Llama, Mistral, Mixtral or Qwen checkpoint: {reason}."
        ) from None
    stored = stored_dtype(config)
    runs = memory_plan.run_dtype(dtype, stored)
    on_disk = sum(path.stat().st_size for path in weight_files(directory) if path.is_file())
    weight_bytes = on_disk * WIDTHS[runs] // WIDTHS.get(stored, 2)
    return ModelSize(
        max_position_embeddings=longest,
        dtype=runs,
        tp=tp,
        rank_weight_bytes=weight_bytes if tp == 1 else math.ceil(weight_bytes * _rank_share(config, tp)),
        kv_bytes_per_token=tp * memory_plan.kv_bytes_per_token(attention, runs, tp),
        head_bytes=_tied_head(config) * WIDTHS[runs],
    )


def _tied_head(config: Mapping[str, Any]) -> int:
    """Weights of a head that has none of its own."""
    if not config.get("tie_word_embeddings", False):
        return 0
    return int(config.get("vocab_size", 0)) * int(config.get("hidden_size", 0))


def _rank_share(config: Mapping[str, Any], tp: int) -> float:
    """Of a model's weights that are on the fullest of `tp` ranks."""
    shape = read_shape(config)
    memory_plan.check_split(shape, tp)
    weights = memory_plan.count_weights(shape, tp)
    return sum(weight.rank_count for weight in weights) / sum(weight.count for weight in weights)


def check_gpus(config: ServeConfig, num_gpus: int) -> None:
    """Raises ConfigError where ranks of one worker would share a GPU: NCCL knows no two on one."""
    needed = config.num_ranks
    if config.most_tp > 1 and 0 < num_gpus < needed:
        flag = "--tp" if config.tp == config.most_tp else "--prefill-tp"
        raise ConfigError(
            f"{flag} is {config.most_tp}: the {needed} ranks of {config.num_workers} workers need {needed} GPUs, and "
            f"here are {num_gpus}: lower {flag}, or have fewer workers (--both 1 is one alone)."
        )


def settle_context(config: ServeConfig, size: ModelSize) -> int:
    """Tokens of prompt and answer together. Raises ConfigError when more is asked for than the model knows."""
    return memory_plan.settle_context(config.max_model_len, size.max_position_embeddings)


def settle_kv_bytes(config: ServeConfig, size: ModelSize, context: int, free_bytes: int) -> int:
    """Bytes of KV cache for each worker on the CPU, with the arithmetic when it does not fit.

    One request of full length must fit in a worker; swap memory that is asked for is taken beside it. Raises
    ConfigError.
    """
    workers = config.num_workers
    one_request = context * size.kv_bytes_per_token
    swap = config.swap_memory or 0
    fixed = _without_kv(config, size) + config.num_decoding * swap
    given = config.kv_memory
    if given is None:
        given = cpu_kv_bytes(free_bytes - fixed, one_request, workers)
    if given < one_request:
        raise ConfigError(
            f"--kv-memory {format_size(given)} holds no request of {context} tokens, which takes "
            f"{format_size(one_request)}: give more, or a smaller --max-model-len."
        )
    need = fixed + workers * given
    if need > free_bytes:
        each = " + ".join(
            (
                f"{format_size(size.weight_bytes + size.head_bytes)} weights",
                f"{format_size(given)} KV",
                format_size(_processes(config)),
            )
        )
        swaps = f"{config.num_decoding} x {format_size(swap)} swap + " if swap else ""
        raise ConfigError(
            f"Not enough memory: {workers} workers x ({each}) + {swaps}{format_size(_BASE_BYTES)} for the rest = "
            f"{format_size(need)}, free are {format_size(free_bytes)}: lower --kv-memory"
            f"{', --swap-memory' if swap else ''} or --max-model-len, or choose a smaller model."
        )
    return given


def settle_swap_bytes(config: ServeConfig, size: ModelSize, kv_bytes: int, free_bytes: int) -> int:
    """Bytes of host memory for preempted sequences of each worker that decodes: what is asked for, else a share of what
    is left beside everything else. kv_bytes: of each worker, as far as host memory holds it."""
    if config.swap_memory is not None:
        return config.swap_memory
    left = free_bytes - _without_kv(config, size) - config.num_workers * kv_bytes
    return default_swap_bytes(max(0, left), config.num_decoding)


def _without_kv(config: ServeConfig, size: ModelSize) -> int:
    return _BASE_BYTES + config.num_workers * (_processes(config) + size.weight_bytes + size.head_bytes)


def _processes(config: ServeConfig) -> int:
    """Bytes of a worker's processes, without weights and KV."""
    return _PROCESS_BYTES + (config.most_tp - 1) * _RANK_BYTES


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
