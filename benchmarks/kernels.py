"""How near each kernel comes to the memory bandwidth of this GPU, which the same run measures first.

    PYTHONPATH=src python -P benchmarks/kernels.py [--quick]

Times are those of CUDA graphs that hold one call for each layer or part of the memory, over more bytes than the L2
cache holds where the case allows it; the median of several replays. "share" is of the rate of plain reads, the fastest
that this memory was seen to do. Bytes count K and V once, however often a kernel reads them.
"""

import argparse
import ctypes
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from baton.kernels import build
from baton.kernels.block_copy import gather_blocks, scatter_blocks
from baton.kernels.paged_attention import Workspace, paged_decode_attention, plan_decode
from baton.kernels.write_kv import write_kv

GIB = 1 << 30
LAYERS, KV_HEADS, BLOCK_TOKENS, HEAD_SIZE = 32, 8, 16, 128  # Llama 3 8B; 32 query heads
POOL_TOKENS = 262_144  # 32 GiB
REPLAYS = 7
MIN_CALLS = 16  # in a graph: the start of a replay costs 10 to 70 us, which is not the kernel's

RIVAL_US = {
    (1, 1024): 8.5, (16, 1024): 21.6, (64, 1024): 73.0, (256, 1024): 261.5,
    (1, 4096): 12.2, (16, 4096): 70.3, (64, 4096): 249.4, (256, 4096): 961.4,
    (1, 16384): 25.4, (16, 16384): 250.2, (64, 16384): 946.6, (256, 16384): 3744.0,
    (1, 32768): 41.9, (16, 32768): 488.8,
}  # fmt: skip
"""Sequences, context -> microseconds of a layer's decode attention, the best of FlashInfer 0.6.14 and vLLM 0.26's
FlashAttention 3, on an H200 that read at RIVAL_PEAK bytes per second."""

RIVAL_PEAK = 4.56e12


def seconds(work: Callable[[], None]) -> float:
    """Median time of one replay of a graph of this work."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # warm: first launches load code
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


class Table:
    """Rows of one benchmark each, printed as they come."""

    def __init__(self) -> None:
        print(f"{'kernel':<24}{'case':<34}{'us a call':>11}{'GB/s':>9}  share")

    def row(self, kernel: str, case: str, *, calls: int, moved: int, total_s: float, peak: float | None) -> float:
        """Print one row; `moved` bytes and `total_s` are of all calls together. Returns bytes per second."""
        rate = moved / total_s
        share = "" if peak is None else f"{rate / peak:6.1%}"
        print(f"{kernel:<24}{case:<34}{total_s / calls * 1e6:>11.1f}{rate / 1e9:>9.0f} {share}", flush=True)
        return rate


def probe(table: Table, folder: Path) -> float:
    """Bytes per second of plain reads; a plain copy is shown beside them."""
    nvcc = build.find_nvcc()
    assert nvcc is not None, "nvcc is missing"
    library_path = folder / "bandwidth.so"
    arch = build.architecture(torch.cuda.get_device_capability())
    build.run_nvcc(nvcc, arch, [Path(__file__).with_name("bandwidth.cu")], library_path)
    library = ctypes.CDLL(str(library_path))
    size = 4 * GIB
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda").random_() for _ in range(2))
    blocks = torch.cuda.get_device_properties(0).multi_processor_count * 2

    def copy() -> None:
        pointers = (ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(target.data_ptr()))
        code = library.copy_memory(*pointers, ctypes.c_int64(size), ctypes.c_void_p(build.stream(source.device)))
        assert code == 0, code

    def read() -> None:
        pointers = (ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(target.data_ptr()))
        stream = ctypes.c_void_p(build.stream(source.device))
        code = library.read_memory(*pointers, ctypes.c_int64(size // 16), blocks, stream)
        assert code == 0, code

    reads = table.row("plain reads", "4 GiB", calls=1, moved=size, total_s=seconds(read), peak=None)
    table.row("cudaMemcpy", "4 GiB, read + written", calls=1, moved=2 * size, total_s=seconds(copy), peak=reads)
    return reads


def bench_block_copy(table: Table, pool: Tensor, peak: float) -> None:
    """Blocks of an 8B model (2 MiB), and of the small model's size, in and out of one run of bytes."""
    total = 2 * GIB
    flat = pool.view(torch.uint8).view(-1)
    for size, name in ((2 << 20, "2 MiB"), (48 << 10, "48 KiB")):
        blocks = flat[: flat.numel() // size * size].view(-1, size)
        for count in (8, 64, total // size // 2):
            calls = max(1, total // (count * size))
            order = torch.randperm(len(blocks), device=pool.device).to(torch.int32)
            parts = [order[i * count : (i + 1) * count] for i in range(calls)]
            run = torch.empty(calls * count, size, dtype=torch.uint8, device=pool.device)
            runs = [run[i * count : (i + 1) * count] for i in range(calls)]
            for op in (gather_blocks, scatter_blocks):

                def work(op: Callable[[Tensor, Tensor, Tensor], None] = op) -> None:
                    for ids, packed in zip(parts, runs, strict=True):  # noqa: B023 (called in this round only)
                        op(blocks, ids, packed)  # noqa: B023

                moved = 2 * calls * count * size
                table.row(
                    op.__name__, f"{count} blocks of {name}", calls=calls, moved=moved, total_s=seconds(work), peak=peak
                )


def bench_write_kv(table: Table, pool: Tensor, peak: float) -> None:
    for tokens in (64, 2048, 8192):
        qkv = torch.randn(LAYERS, tokens, 48, HEAD_SIZE, device=pool.device).to(pool.dtype)  # each layer's own
        k, v = qkv[:, :, 32:40], qkv[:, :, 40:]
        slots = torch.randperm(POOL_TOKENS, device=pool.device)[:tokens]

        def work() -> None:
            for layer in range(LAYERS):
                write_kv(k[layer], v[layer], pool, layer, slots)  # noqa: B023

        moved = LAYERS * 4 * tokens * KV_HEADS * HEAD_SIZE * pool.element_size()
        table.row("write_kv", f"{tokens} tokens", calls=LAYERS, moved=moved, total_s=seconds(work), peak=peak)


def bench_attention(table: Table, peak: float, quick: bool) -> None:
    """Decode attention, 32 query heads on 8, shuffled blocks of 16, a call for each layer, the plan outside."""
    cells = list(RIVAL_US)
    for sequences, context in cells[:4] if quick else cells:
        layer_bytes = sequences * context * 2 * KV_HEADS * HEAD_SIZE * 2
        layers = max(1, min(64, 2 * GIB // layer_bytes))  # each pass reads more than the L2 cache holds
        torch.cuda.empty_cache()
        pool = random_pool(sequences * context // BLOCK_TOKENS, layers)
        order = torch.randperm(len(pool), device=pool.device)
        tables = order.view(sequences, -1).to(torch.int32).contiguous()
        lens = torch.full((sequences,), context, dtype=torch.int32, device=pool.device)
        q = torch.randn(sequences, 32, HEAD_SIZE, device=pool.device).to(pool.dtype)
        out = torch.empty_like(q)
        plan = plan_decode(pool, tables, lens, {None}, Workspace())
        calls = layers * -(-MIN_CALLS // layers)

        def work() -> None:
            for call in range(calls):  # noqa: B023
                layer = call % layers  # noqa: B023
                paged_decode_attention(q, pool, layer, tables, lens, HEAD_SIZE**-0.5, None, out, plan)  # noqa: B023

        total = seconds(work)
        rival = layer_bytes / (RIVAL_US[sequences, context] * 1e-6) / RIVAL_PEAK
        rate = table.row(
            "paged_decode_attention",
            f"{sequences} x {context}",
            calls=calls,
            moved=calls * layer_bytes,
            total_s=total,
            peak=peak,
        )
        print(f"{'':<58}{'share / best rival' + chr(39) + 's':>22} {rate / peak / rival:.3f}", flush=True)


def random_pool(num_blocks: int, layers: int) -> Tensor:
    pool = torch.empty((num_blocks, layers, 2, KV_HEADS, BLOCK_TOKENS, HEAD_SIZE), dtype=torch.bfloat16, device="cuda")
    step = max(1, GIB // pool[0].nbytes)
    for start in range(0, num_blocks, step):
        pool[start : start + step].normal_()
    return pool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases of attention")
    quick = parser.parse_args().quick
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing to measure")
        return 0
    if build.cuda_library(torch.device("cuda", torch.cuda.current_device())) is None:
        print("no CUDA kernels: nvcc is missing", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        reads = probe(table, Path(folder))
    torch.cuda.empty_cache()
    bench_attention(table, reads, quick)
    pool = random_pool(POOL_TOKENS // BLOCK_TOKENS, LAYERS)
    bench_write_kv(table, pool, reads)
    bench_block_copy(table, pool, reads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
