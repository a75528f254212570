"""The CUDA sources compiled for the CPU, so that what they compute is tested where there is no GPU. See cuda.h."""

import ctypes
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from baton.kernels import build

HERE = Path(__file__).parent
FLAGS = ("-fPIC", "-O1", "-std=c++20", "-x", "c++", "-w", "-D__CUDA_ARCH_LIST__=900")
MULTIPROCESSORS = 5  # few, so that small problems are split as large ones are

_LAUNCH = re.compile(r"(\w+(?:<[^<>;]*>)?)<<<(.*?)>>>\s*\((.*?)\);", re.DOTALL)
_DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];")


def cuda_headers() -> Path | None:
    """CUDA's own, of the toolkit that has nvcc."""
    nvcc = build.find_nvcc()
    for home in () if nvcc is None else (Path(nvcc).resolve().parents[1], Path("/usr/local/cuda")):
        if (home / "include" / "cuda_bf16.h").exists():
            return home / "include"
    return None


def missing() -> str | None:
    """What emulation lacks on this machine."""
    if platform.machine() != "x86_64":
        return "its switch of stacks is written for x86-64"
    if shutil.which("g++") is None:
        return "needs g++"
    return "needs CUDA's headers" if cuda_headers() is None else None


def as_cpp(source: str) -> str:
    """A CUDA source without the syntax that only nvcc knows."""
    assert not re.search(r"\basm\b", source), "PTX belongs into ptx.cuh, hopper.cuh or launch.cuh"
    source = _LAUNCH.sub(r"emulation::launch(\2, [&] { \1(\3); });", source)
    return _DYNAMIC.sub(r"\1* \2 = reinterpret_cast<\1*>(emulation::shared_memory);", source)


def compile_for_cpu() -> ctypes.CDLL:
    """All of kernels/csrc as one library, with the functions and signatures of the real one. Compiled once."""
    folder = build.cache_folder() / "emulation"
    folder.mkdir(exist_ok=True)
    stand_ins = {path.name: path.read_text() for path in (HERE / "cuda.h", *HERE.glob("*.cuh"))}
    sources = (path for path in build.SOURCES.glob("*.cu*") if path.name not in stand_ins)
    texts = {path.name: as_cpp(path.read_text()) for path in sources} | stand_ins
    headers = {name: text for name, text in texts.items() if not name.endswith(".cu")}
    made = {
        name: folder / f"{name}-{_digest(headers, texts[name])}.o" for name in sorted(texts.keys() - headers.keys())
    }
    library = folder / f"{_digest(*map(str, made.values()))}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as at:
            _compile({name: path for name, path in made.items() if not path.exists()}, texts, Path(at))
            linked = Path(at) / library.name
            subprocess.run(["g++", "-shared", "-o", str(linked), *map(str, made.values())], check=True)
            linked.rename(library)
    return build.load(library)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr((FLAGS, parts)).encode()).hexdigest()[:16]


def _compile(wanted: dict[str, Path], texts: dict[str, str], at: Path) -> None:
    for name, text in texts.items():
        (at / name).write_text(text)
    command = ["g++", *FLAGS, "-c", f"-I{cuda_headers()}", "-include", str(at / "cuda.h")]
    running = [subprocess.Popen([*command, str(at / name), "-o", str(at / f"{name}.o")]) for name in wanted]
    failed = [process.args for process in running if process.wait() != 0]
    assert not failed, failed
    for name, path in wanted.items():
        (at / f"{name}.o").rename(path)


def use(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the ops run these kernels, on tensors of the CPU."""
    for name, module in list(sys.modules.items()):
        if name.startswith("baton.kernels."):
            for attribute, value in (
                ("cuda_library", lambda device: library),
                ("stream", lambda device: 0),
                ("multiprocessors", lambda device: MULTIPROCESSORS),
            ):
                if hasattr(module, attribute):
                    monkeypatch.setattr(module, attribute, value)
