"""What the CPU of this machine computes well. No torch: whoever plans a cluster asks here too."""

from pathlib import Path

_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one on ARM
_CPUINFO = Path("/proc/cpuinfo")


def computes_bfloat16(cpuinfo: Path = _CPUINFO) -> bool:
    """It has instructions for it. On one without, a model in bfloat16 took seven to ten times as long as in float32."""
    for line in cpuinfo.read_text().splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not _BFLOAT16.isdisjoint(flags.split())
    return False
