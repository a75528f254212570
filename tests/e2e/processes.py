"""What the processes of a cluster are, know and listen on: read from /proc."""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from pathlib import Path


def command(pid: int) -> str:
    """Its command line; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def environment(pid: int) -> dict[str, str]:
    """Empty where it is gone or not ours."""
    try:
        parts = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return {key: value for key, _, value in (part.partition("=") for part in parts)}


def everyone() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def with_command(part: str) -> list[int]:
    """Those whose command line holds `part`."""
    return [pid for pid in everyone() if part in command(pid)]


def that_know(token: str) -> list[int]:
    """Those of the cluster whose services share this token, wherever they hang in the tree of processes."""
    return [pid for pid in everyone() if token in environment(pid).values()]


def descendants(root: int) -> set[int]:
    parents = {}
    for pid in everyone():
        with suppress(OSError):
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    found, grown = {root}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return found - {root}


def listening(pids: set[int]) -> list[tuple[str, int]]:
    """(address, process) of every TCP socket on which one of them listens."""
    owner = {}
    for pid in pids:
        with suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    owner[os.readlink(entry)] = pid
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            pid = owner.get(f"socket:[{fields[9]}]")
            if pid is not None and fields[3] == "0A":
                found.append((_address(fields[1].split(":")[0]), pid))
    return found


def _address(text: str) -> str:
    """Of the kernel's hexadecimal words, each in the machine's (little-endian) order."""
    words = b"".join(bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8))
    found = ipaddress.ip_address(socket.inet_ntop(socket.AF_INET if len(words) == 4 else socket.AF_INET6, words))
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)
