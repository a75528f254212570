from pathlib import Path

import pytest

from baton.engine.cpu import computes_bfloat16


@pytest.mark.parametrize(
    ("line", "has"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", True),
        ("flags\t\t: fpu amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu avx2 fma bf16c", False),
        ("model name : a CPU with avx512_bf16", False),
        ("", False),
    ],
)
def test_a_cpu_says_by_its_flags_whether_it_computes_bfloat16(tmp_path: Path, line: str, has: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{line}\n")
    assert computes_bfloat16(cpuinfo) is has
