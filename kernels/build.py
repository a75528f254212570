"""Compiles `csrc/*.cu` once per GPU architecture and binds the result by ctypes.

The library is kept in the user's cache (`$XDG_CACHE_HOME/baton/kernels`, else `~/.cache/baton/kernels`) under a name
that holds a hash of the sources and flags, so a changed source is compiled anew and an unchanged one never again.
`python -m baton.kernels.build` fills the cache ahead of time for the GPUs that are here; with `90a 100` for those
architectures, for an image without a compiler.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static", "-lineinfo")
COMPILE_TIMEOUT_S = 600.0
LOCK_TIMEOUT_S = 900.0  # another process may be compiling

# dtype codes of the C interface
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

# name in the library -> types of its arguments; every one ends in the stream and returns a cudaError_t
SIGNATURES: dict[str, tuple[type, ...]] = {
    "gather_blocks": (c_void_p, c_void_p, c_void_p, c_int, c_int64, c_void_p),
    "scatter_blocks": (c_void_p, c_void_p, c_void_p, c_int, c_int64, c_void_p),
    "write_kv": (*[c_void_p] * 4, c_int64, c_int64, *[c_int] * 6, c_void_p),
    "peer_sum": (*[c_void_p] * 10, c_int64, *[c_int] * 4, c_float, c_void_p),
    "peer_send": (*[c_void_p] * 6, c_int64, c_int, c_void_p),
    "peer_receive": (*[c_void_p] * 7, *[c_int64] * 3, c_int, c_void_p),
    "plan_split_decode": (*[c_void_p] * 2, *[c_int] * 6, c_void_p),
    "split_decode_attention": (*[c_void_p] * 9, c_int64, c_int64, *[c_int] * 12, *[c_float] * 2, c_void_p),
    "paged_decode_attention": (*[c_void_p] * 5, c_int64, *[c_int] * 9, c_float, c_void_p),
    "prefill_attention": (*[c_void_p] * 10, c_int64, c_int64, *[c_int] * 14, c_float, c_void_p),
    "plan_token_pieces": (*[c_void_p] * 4, *[c_int] * 3, c_void_p),
    "skinny_linear": (*[c_void_p] * 6, c_int64, c_int64, *[c_int] * 6, c_void_p),
    "hopper_linear": (*[c_void_p] * 6, c_int64, c_int64, *[c_int] * 6, c_void_p),
    "choose_tokens": (*[c_void_p] * 17, c_int64, *[c_int] * 8, c_void_p),
    "count_tokens": (*[c_void_p] * 5, c_int, c_int, c_void_p),
    "rotary_write": (*[c_void_p] * 9, c_int, c_int64, c_int64, *[c_int] * 7, c_float, c_void_p),
    "add_rms_norm": (*[c_void_p] * 4, *[c_int] * 3, c_float, c_void_p),
    "silu_gate": (*[c_void_p] * 2, *[c_int] * 3, c_void_p),
}

_CPU = torch.device("cpu")
_log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """The CUDA sources could not be compiled or their cache not be used; the text says what to do."""


class CudaError(RuntimeError):
    """A launch was refused; the text names the op and CUDA's reason."""


def cuda_library(device: torch.device) -> ctypes.CDLL | None:
    """The kernels for this device, compiled on first use; None where the torch references must serve.

    Its functions raise CudaError. That is None for a device other than a GPU, and, with one warning, where the library
    is neither cached nor can be compiled for want of nvcc. Raises BuildError when nvcc fails.
    """
    if device == _CPU or device.type != "cuda":  # asked often: `type` makes a string, which takes a microsecond
        return None
    return _library_for(torch.cuda.get_device_capability(device))


def stream(device: torch.device) -> int:
    """The current stream of a device as a pointer. The device must be the current one, as launches go there."""
    index = torch.cuda.current_device()
    if device.index != index:
        raise ValueError(f"tensor on {device} while cuda:{index} is the current device")
    return torch.cuda.current_stream(index).cuda_stream


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has: that many thread blocks run at once, at one each."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def vector_rows(x: torch.Tensor) -> torch.Tensor:
    """x [T, H, D] itself where each row [H, D] is one run of 16-byte vectors, as kernels read it; else such a copy."""
    is_run = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    if is_run and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def whole_vectors(x: torch.Tensor, parts: int = 1) -> bool:
    """Whether x [..., D] is one run of memory whose rows, or each of their equal parts, are whole 16-byte vectors."""
    return x.is_contiguous() and x.shape[-1] * x.element_size() % (16 * parts) == 0 and x.data_ptr() % 16 == 0


@functools.cache
def _library_for(capability: tuple[int, int]) -> ctypes.CDLL | None:
    path = library_path(architecture(capability))
    if not path.exists():
        nvcc = find_nvcc()
        if nvcc is None:
            _log.warning("no nvcc found (set CUDA_HOME): attention and KV copies run as plain torch, slowly")
            return None
        compile_library(architecture(capability), nvcc)
    return load(path)


def architecture(capability: tuple[int, int]) -> str:
    """nvcc's name for a compute capability: "80", "90a", "100". Hopper's own instructions need the a."""
    major, minor = capability
    return f"{major}{minor}a" if capability == (9, 0) else f"{major}{minor}"


def local_architectures() -> list[str]:
    """Of the GPUs that are here, each once."""
    count = torch.cuda.device_count()
    return sorted({architecture(torch.cuda.get_device_capability(index)) for index in range(count)})


def find_nvcc() -> str | None:
    """$CUDA_HOME's nvcc, else the one on the PATH, else the usual place's."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else []
    for place in (*places, "nvcc", "/usr/local/cuda/bin/nvcc"):
        if found := shutil.which(place):
            return found
    return None


def cache_folder() -> Path:
    """Where compiled libraries are kept. Raises BuildError where it can't be made or belongs to someone else."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(root) if root else Path.home() / ".cache") / "baton" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise BuildError(f"no folder for compiled kernels ({error}); set XDG_CACHE_HOME to a writable one") from error
    if folder.stat().st_uid not in (os.getuid(), 0):  # what lies there is loaded as code
        raise BuildError(f"{folder} belongs to another user; set XDG_CACHE_HOME to a folder of your own")
    return folder


def library_path(arch: str) -> Path:
    """Where the library of the present sources for one architecture lies, or will."""
    # The compiler's version is left out, so that a library made elsewhere is found where there is no compiler.
    digest = hashlib.sha256(repr((FLAGS, arch)).encode())
    for source in sorted(SOURCES.glob("*.cu*")):
        digest.update(f"\0{source.name}\0".encode() + source.read_bytes())
    return cache_folder() / f"kernels-sm{arch}-{digest.hexdigest()[:16]}.so"


def compile_library(arch: str, nvcc: str) -> Path:
    """Compile all sources for one architecture unless that has been done; returns the library's path."""
    path = library_path(arch)
    with _locked(path.with_suffix(".lock")):
        if not path.exists():
            began = time.monotonic()
            _log.info("compiling CUDA kernels for sm_%s", arch)
            run_nvcc(nvcc, arch, sorted(SOURCES.glob("*.cu")), path)
            _log.info("compiled CUDA kernels in %.1f s: %s", time.monotonic() - began, path)
    return path


def run_nvcc(nvcc: str, arch: str, sources: Sequence[Path], to: Path) -> None:
    """Compile sources into the shared library `to`, which appears whole or not at all. Raises BuildError.

    Each on a core of its own: the slowest takes as long as half of all others together.
    """
    command = (nvcc, *FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}")
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:  # the same file system, for the rename
        made = Path(folder) / to.name
        objects = [Path(folder) / f"{source.name}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            compiling = [
                threads.submit(_run, *command, "-c", "-o", str(at), str(source))
                for at, source in zip(objects, sources, strict=True)
            ]
        for one in compiling:
            one.result()
        _run(*command, "-shared", "-o", str(made), *map(str, objects))
        made.replace(to)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)  # noqa: S603 (our own words)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"nvcc did not run: {error}") from error
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip()[-4000:]
        raise BuildError(f"nvcc failed with status {done.returncode}\n  {' '.join(command)}\n{said}")


def load(path: Path) -> ctypes.CDLL:
    """Open a compiled library, each function with the types of its arguments. Raises BuildError."""
    try:
        library = ctypes.CDLL(str(path))
        library.error_string.argtypes = [c_int]
        library.error_string.restype = ctypes.c_char_p
        for name, arguments in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = c_int
            function.errcheck = functools.partial(_raise_on_error, library, name)
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} is no library of kernels ({error}); remove it and start again") from error
    return library


def _raise_on_error(library: ctypes.CDLL, name: str, code: int, *_: object) -> int:
    if code != 0:
        raise CudaError(f"{name}: {library.error_string(code).decode()} (cudaError {code})")
    return code


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the kernel lets go of it when its holder dies."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(f"another process has held {path} for {LOCK_TIMEOUT_S:.0f} s") from None
                time.sleep(0.1)
        yield


def main(architectures: Sequence[str]) -> int:
    """Compile for the architectures named, else for the GPUs that are here, and say where the libraries lie."""
    nvcc = find_nvcc()
    architectures = architectures or local_architectures()
    if nvcc is None or not architectures:
        print("usage: python -m baton.kernels.build [ARCH...]   (such as 80 90a 100; needs nvcc)", file=sys.stderr)
        return 2
    for arch in architectures:
        print(compile_library(arch, nvcc))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
