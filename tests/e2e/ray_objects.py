"""How many objects lie in a cluster's Ray object store, as Ray itself counts them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from .cluster import Cluster

COUNT = "import sys; from ray._private.internal_api import memory_summary as s; print(s(sys.argv[1], stats_only=True))"


def assert_none(cluster: Cluster, timeout_s: float = 30.0) -> None:
    """None is left within the time: Ray frees an object when it has heard from all who borrowed it."""
    deadline = time.monotonic() + timeout_s
    while (objects := count(cluster)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert objects == 0


def count(cluster: Cluster) -> int:
    """Asks from a process of its own, with the address, token and settings of the cluster's raylet."""
    raylet, environ = next(
        (command, environ)
        for command, environ in map(read, Path("/proc").glob("[0-9]*"))
        if "/raylet " in command and f"BATON_CLUSTER_TOKEN={cluster.token}" in environ
    )
    found = re.search(r"--gcs-address=(\S+)", raylet)
    assert found, raylet
    settings = {key: value for key, _, value in (line.partition("=") for line in environ) if key.startswith("RAY_")}
    command = [sys.executable, "-c", COUNT, found[1]]
    answer = subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=60, check=True
    )
    objects = re.search(r"Plasma memory usage .*?, (\d+) objects", answer.stdout)
    assert objects, answer.stdout
    return int(objects[1])


def read(process: Path) -> tuple[str, list[str]]:
    """Command line and environment of a process; empty where it is gone or not ours."""
    try:
        command, environ = ((process / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ"))
    except OSError:
        return "", []
    return command.replace("\0", " "), environ.split("\0")
