"""The router as a child of `baton serve`: started, watched, started again when it dies."""

import http
import http.client
import os
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..core.errors import ConfigError
from ..router.config import VARIABLE, RouterConfig
from .children import Child

_CHECK_S = 1.0
_EVERY_S = 0.25
_TRIES = 5
_STEADY_S = 60.0  # a life this long forgives the deaths before it
_EXIT_MISTAKE = 2
_STOP_EXTRA_S = 5.0


class RouterProcess:
    """Call its methods from the main thread."""

    def __init__(self, config: RouterConfig, log: Path) -> None:
        self._config = config
        self._log = log
        self._failures = 0
        self._next_check = 0.0
        self._ready = False
        self._start()

    def tick(self, tell: Callable[[str], None]) -> None:
        """Start it again if it has ended. Raises ConfigError when that would not help."""
        status = self._child.poll()
        if status is None:
            return
        self._ready = False
        if status == _EXIT_MISTAKE:
            raise ConfigError(self._child.last_lines(1))
        self._failures = 1 if time.monotonic() - self._started >= _STEADY_S else self._failures + 1
        if self._failures >= _TRIES:
            raise ConfigError(f"The router ended {self._failures} times: {self._child.last_lines(3)}")
        tell(f"The router ended (exit status {status}); it starts again.")
        self._start()

    def is_ready(self) -> bool:
        """It serves: its health says so, which means that workers are linked that serve together, or one alone."""
        now = time.monotonic()
        if not self._ready and now >= self._next_check:
            self._next_check = now + _EVERY_S
            self._ready = self._asks_healthy()
        return self._ready

    def last_lines(self) -> str:
        return self._child.last_lines(2)

    def stop(self, drain_s: float) -> None:
        """It refuses new requests and lets the running ones finish within `drain_s`; then it is killed."""
        self._child.terminate()
        self._child.wait(drain_s + _STOP_EXTRA_S)

    def _start(self) -> None:
        self._started = time.monotonic()
        command = [sys.executable, "-m", "baton.router"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
        environment[VARIABLE] = self._config.to_json()
        self._child = Child.start("router", command, log=self._log, stdout=Path(os.devnull), env=environment)

    def _asks_healthy(self) -> bool:
        config = self._config
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)  # noqa: S104  # only compared
        connection = http.client.HTTPConnection(host, config.http_port, timeout=_CHECK_S)
        if config.tls_certificate is not None:
            # Only whether our own child is ready is asked, nothing is told: its certificate may be for any name.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            connection = http.client.HTTPSConnection(host, config.http_port, timeout=_CHECK_S, context=context)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
