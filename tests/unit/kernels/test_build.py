"""The CUDA sources compile for every architecture we name, load, and fail with words; none of it needs a GPU."""

import ctypes
import logging
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from baton.kernels import build

NVCC = build.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc, CUDA's compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "baton" / "kernels"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert NVCC is not None
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    build.run_nvcc(NVCC, "90a", sorted(build.SOURCES.glob("*.cu")), library)
    return library


def fake_nvcc(folder: Path, script: str) -> str:
    """A stand-in compiler: `$1` ... are its arguments, `$out` where the library should go."""
    path = folder / "nvcc"
    find_out = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done\n'
    path.write_text(f"#!/bin/sh\n{find_out}{script}\n")
    path.chmod(0o755)
    return str(path)


every_case = pytest.mark.skipif(not os.environ.get("EVERY_CASE"), reason="a minute: set EVERY_CASE")


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", pytest.param("100", marks=every_case)])
def test_every_source_compiles_for(arch: str, tmp_path: Path) -> None:
    assert NVCC is not None
    library = tmp_path / "kernels.so"
    build.run_nvcc(NVCC, arch, sorted(build.SOURCES.glob("*.cu")), library)
    build.load(library)


@needs_nvcc
@pytest.mark.parametrize("name", ["prefill_attention.cu", "hopper_linear.cu"])
def test_the_assembler_keeps_hopper_s_products_asynchronous(name: str, tmp_path: Path) -> None:
    """It makes them wait for each other, and says so, where it can't follow which registers they use, or lacks some."""
    assert NVCC is not None
    source, flags = build.SOURCES / name, ("-O3", "-std=c++17", "-cubin", "-Xptxas=-v")
    command = [NVCC, *flags, "-gencode=arch=compute_90a,code=sm_90a", "-o", str(tmp_path / "cubin"), str(source)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stderr
    assert "setmaxnreg" not in said, said  # it says so where it ignores one
    assert "wgmma" not in said, said
    assert said.count("bytes spill stores") == said.count(" 0 bytes spill stores, 0 bytes spill loads") > 0, said


@needs_nvcc
def test_the_library_for_hopper_has_every_function_with_its_signature(compiled: Path) -> None:
    library = build.load(compiled)
    for name, arguments in build.SIGNATURES.items():
        assert tuple(getattr(library, name).argtypes) == arguments


@needs_nvcc
def test_signatures_agree_with_the_sources_in_the_number_of_arguments() -> None:
    text = "".join(path.read_text() for path in build.SOURCES.glob("*.cu"))
    for name, arguments in build.SIGNATURES.items():
        declared = text.split(f"BATON_EXPORT int {name}(")[1].split(")")[0]
        assert len(declared.split(",")) == len(arguments), name


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the launch would run")
def test_a_refused_launch_raises_and_names_the_op_and_the_reason(compiled: Path) -> None:
    library = build.load(compiled)
    memory = ctypes.addressof(ctypes.create_string_buffer(64))
    with pytest.raises(build.CudaError, match=r"gather_blocks: .*cudaError \d+"):
        library.gather_blocks(memory, memory, memory, 1, 1, None)
    with pytest.raises(build.CudaError, match="invalid argument"):
        library.gather_blocks(memory, memory, memory, -1, 1, None)


def test_the_cpu_has_no_cuda_library() -> None:
    assert build.cuda_library(torch.device("cpu")) is None


def test_a_failing_compiler_raises_with_its_words_and_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    nvcc = fake_nvcc(tmp_path, 'echo "half a library" > "$out"; echo "error: no such thing" >&2; exit 3')
    with pytest.raises(build.BuildError, match="status 3") as caught:
        build.compile_library("80", nvcc)
    assert "no such thing" in str(caught.value)
    assert not list(cache.glob("*.so*"))
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_compiler_that_cannot_start_raises(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(build.BuildError, match="did not run"):
        build.compile_library("80", str(tmp_path / "missing"))
    assert not list(cache.glob("*.so*"))


def test_many_at_once_compile_once(tmp_path: Path, cache: Path) -> None:
    log = tmp_path / "runs"
    nvcc = fake_nvcc(tmp_path, f'echo run >> {log}; echo library > "$out"')
    threads = [threading.Thread(target=build.compile_library, args=("80", nvcc)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert log.read_text() == "run\n" * (len(list(build.SOURCES.glob("*.cu"))) + 1)  # each source, and all together
    assert build.library_path("80").read_text() == "library\n"


def test_a_changed_source_gets_another_name(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    before = build.library_path("80")
    assert build.library_path("80") == before
    assert build.library_path("90a") != before
    (sources / "common.cuh").write_text((sources / "common.cuh").read_text() + "\n// another\n")
    assert build.library_path("80") != before


def test_a_cache_of_another_user_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)
    owner = cache.stat().st_uid
    if owner == 0:
        os.chown(cache, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(build.BuildError, match="another user"):
        build.cache_folder()


def test_a_damaged_library_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "kernels.so"
    path.write_bytes(b"no library")
    with pytest.raises(build.BuildError, match="remove it"):
        build.load(path)


def test_without_nvcc_one_warning_says_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    build._library_for.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert build.cuda_library(torch.device("cuda", 0)) is None
    finally:
        build._library_for.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_architectures_are_named_as_nvcc_names_them() -> None:
    names = {(8, 0): "80", (8, 9): "89", (9, 0): "90a", (10, 0): "100", (12, 1): "121"}
    assert {capability: build.architecture(capability) for capability in names} == names


def test_the_command_needs_an_architecture(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert build.main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_the_command_compiles_for_the_gpus_that_are_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capabilities = [(9, 0), (8, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(build, "compile_library", lambda arch, nvcc: Path(f"{nvcc}-{arch}.so"))
    assert build.main([]) == 0
    assert capsys.readouterr().out.split() == ["nvcc-80.so", "nvcc-90a.so"]
