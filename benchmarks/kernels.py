"""How near each kernel comes to the memory bandwidth of this GPU, which the same run measures first.

    PYTHONPATH=src python -P benchmarks/kernels.py [--quick]

Times are those of CUDA graphs that hold one call for each layer or part of the memory, over more bytes than the L2
cache holds where the case allows it; the median of several replays. "share" is of the rate of plain reads, the fastest
that this memory was seen to do. Bytes count K and V once, however often a kernel reads them. Prefill attention is told
in TFLOP/s of the lower triangle instead.
"""

import argparse
import ctypes
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from baton.kernels import build
from baton.kernels.activation import silu_gate
from baton.kernels.block_copy import gather_blocks, scatter_blocks
from baton.kernels.norm import add_rms_norm, rms_norm
from baton.kernels.paged_attention import Workspace, paged_decode_attention, plan_decode
from baton.kernels.prefill_attention import PrefillPlan, is_tiled, paged_prefill_attention, plan_prefill
from baton.kernels.rotary_write import plan_rotation, rotary_write
from baton.kernels.sampling import ROW, RowTables, SamplingWorkspace, TokensOut, choose_tokens
from baton.kernels.skinny_linear import SkinnyWorkspace, skinny_linear
from baton.kernels.write_kv import write_kv

PARTS = ("linear", "chain", "sampling", "attention", "prefill", "small")
GIB = 1 << 30
LAYERS, HEADS, KV_HEADS, BLOCK_TOKENS, HEAD_SIZE = 32, 32, 8, 16, 128  # Llama 3 8B
HIDDEN, INNER, POSITIONS = 4096, 14336, 8192
POOL_TOKENS = 262_144  # 32 GiB
VOCABULARY = 128_256
REPLAYS = 7
MIN_CALLS = 16  # in a graph: the start of a replay costs 10 to 70 us, which is not the kernel's
LINEARS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}  # a layer's weights [outputs, inputs]

RIVAL_US = {
    (1, 1024): 8.5, (16, 1024): 21.6, (64, 1024): 73.0, (256, 1024): 261.5,
    (1, 4096): 12.2, (16, 4096): 70.3, (64, 4096): 249.4, (256, 4096): 961.4,
    (1, 16384): 25.4, (16, 16384): 250.2, (64, 16384): 946.6, (256, 16384): 3744.0,
    (1, 32768): 41.9, (16, 32768): 488.8,
}  # fmt: skip
"""Sequences, context -> microseconds of a layer's decode attention, the best of FlashInfer 0.6.14 and vLLM 0.26's
FlashAttention 3, on an H200 that read at RIVAL_PEAK bytes per second."""

RIVAL_PEAK = 4.56e12

RIVAL_PREFILL_MS = {(1, 2048): 0.0733, (1, 8192): 0.881, (4, 2048): 0.268, (1, 32768): 14.83}
"""Prompts, tokens -> milliseconds of a layer's prefill attention over pages of 16, vLLM 0.26's FlashAttention 3."""


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


def bench_linear(table: Table, peak: float) -> None:
    """Products with an 8B model's weights, ours and torch's (cuBLAS); then with what a layer does before and after."""
    for name, (outputs, inputs) in LINEARS.items():
        copies = max(2, GIB // 2 // (outputs * inputs * 2))  # a weight has left the L2 cache when its turn comes again
        calls = max(16, copies)
        torch.cuda.empty_cache()
        weights = [torch.empty(outputs, inputs, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(copies)]
        workspace = SkinnyWorkspace(weights[0].device)
        for rows in (1, 8, 16, 32, 64, 128, 256, 2048, 8192) if name != "head" else (1, 8, 16, 32, 64):
            x = torch.randn(rows, inputs, device="cuda").to(torch.bfloat16)
            out = torch.randn(rows, outputs, device="cuda").to(torch.bfloat16)
            half = torch.empty(rows, outputs // 2, dtype=torch.bfloat16, device="cuda")
            for kernel, call in linear_calls(name, x, out, half, workspace).items():

                def work(call: Callable[[Tensor], object] = call) -> None:
                    for i in range(calls):  # noqa: B023 (called in this round only)
                        call(weights[i % copies])  # noqa: B023

                moved = calls * (outputs * inputs + rows * (inputs + outputs)) * 2
                total = seconds(work)
                table.row(kernel, f"{name}, {rows} rows", calls=calls, moved=moved, total_s=total, peak=peak)
                if rows > 64:
                    rate = 2 * calls * rows * outputs * inputs / total
                    print(f"{'':<58}{rate / 1e12:>20.0f} TFLOP/s", flush=True)


def linear_calls(
    name: str, x: Tensor, out: Tensor, half: Tensor, workspace: SkinnyWorkspace
) -> dict[str, Callable[[Tensor], object]]:
    """Ways to use a weight: the bare product, ours and torch's, and the same two with what goes with it in a layer."""
    ours = partial(skinny_linear, x, workspace=workspace)
    calls: dict[str, Callable[[Tensor], object]] = {
        "skinny_linear": lambda w: ours(w, out=out),
        "torch": lambda w: torch.mm(x, w.T, out=out),
    }
    if name in ("o", "down"):
        calls["skinny_linear, added"] = lambda w: ours(w, out=out, add=True)
        calls["torch, added"] = lambda w: out.add_(torch.mm(x, w.T))
    elif name == "gate_up":
        calls["skinny_linear, gated"] = lambda w: ours(w, out=half, gate=True)
        calls["torch, gated"] = lambda w: silu_gate(torch.mm(x, w.T))
    return calls


def bench_layer_chain(table: Table, peak: float) -> None:
    """Products and norms of a decode step, attention and head left out, in one graph over 13 GB of weights."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    shapes = [LINEARS[name] for name in ("qkv", "o", "gate_up", "down")]
    layers = [
        [torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, shape[1] ** -0.5) for shape in shapes]
        for _ in range(LAYERS)
    ]
    norm = torch.ones(HIDDEN, dtype=torch.bfloat16, device=device)
    workspace = SkinnyWorkspace(device)
    moved = sum(outputs * inputs * 2 for outputs, inputs in shapes) * LAYERS
    for rows in (1, 8, 16, 32, 64):
        hidden = torch.randn(rows, HIDDEN, device=device).to(torch.bfloat16)

        def ours(hidden: Tensor = hidden) -> None:
            for qkv, o, gate_up, down in layers:
                heads = skinny_linear(rms_norm(hidden, norm, 1e-5), qkv, workspace)
                skinny_linear(heads[:, :HIDDEN], o, workspace, add=True, out=hidden)
                inner = skinny_linear(rms_norm(hidden, norm, 1e-5), gate_up, workspace, gate=True)
                skinny_linear(inner, down, workspace, add=True, out=hidden)

        def torchs(hidden: Tensor = hidden) -> None:
            delta = torch.zeros_like(hidden)
            for qkv, o, gate_up, down in layers:
                heads = torch.mm(add_rms_norm(delta, hidden, norm, 1e-5), qkv.T)
                delta = torch.mm(heads[:, :HIDDEN], o.T)
                inner = silu_gate(torch.mm(add_rms_norm(delta, hidden, norm, 1e-5), gate_up.T))
                delta = torch.mm(inner, down.T)

        for name, work in (("layer chain", ours), ("layer chain, torch's", torchs)):
            total = seconds(work)
            case = f"{rows} rows, {total * 1e3:.3f} ms in all"
            table.row(name, case, calls=LAYERS, moved=moved, total_s=total, peak=peak)


def bench_layer(table: Table, pool: Tensor, peak: float) -> None:
    """What lies between a layer's products. Each call has inputs of its own, as long as those of all fit 4 GiB."""
    device, dtype = pool.device, pool.dtype

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    weight, cos, sin = numbers(HIDDEN), numbers(POSITIONS, HEAD_SIZE), numbers(POSITIONS, HEAD_SIZE)
    for tokens in (1, 16, 64, 256, 2048, 8192):
        slots = torch.randperm(POOL_TOKENS, device=device)[:tokens]
        rotation = plan_rotation(cos, sin, torch.randint(POSITIONS, (tokens,), device=device), pool)
        for name, width, moved in (  # elements of an input; elements that one token moves
            ("add_rms_norm", 2 * HIDDEN, 4 * HIDDEN),
            ("rotary_write", (HEADS + 2 * KV_HEADS) * HEAD_SIZE, 2 * (HEADS + 2 * KV_HEADS) * HEAD_SIZE),
            ("silu_gate", 2 * INNER, 3 * INNER),
        ):
            calls = max(1, min(LAYERS, 4 * GIB // (tokens * width * dtype.itemsize)))
            inputs = numbers(calls, tokens, width)
            out = torch.empty(tokens, width // 2, device=device, dtype=dtype)

            def work() -> None:
                for layer, given in enumerate(inputs):  # noqa: B023 (called in this round only)
                    if name == "add_rms_norm":  # noqa: B023
                        delta, stream = given.view(2, tokens, HIDDEN)  # noqa: B023
                        add_rms_norm(delta, stream, weight, 1e-5, out)  # noqa: B023
                    elif name == "rotary_write":  # noqa: B023
                        rotary_write(given.view(tokens, -1, HEAD_SIZE), rotation, pool, layer, slots)  # noqa: B023
                    else:
                        silu_gate(given, out)  # noqa: B023

            case, total = f"{tokens} tokens", seconds(work)
            table.row(name, case, calls=calls, moved=calls * tokens * moved * dtype.itemsize, total_s=total, peak=peak)


SAMPLING = {
    "greedy": {},
    "temperature": {"top_k": VOCABULARY},
    "top-k 50": {"top_k": 50},
    "top-p .9": {"top_k": VOCABULARY, "top_p": 0.9},
    "top-p .9, flat": {"top_k": VOCABULARY, "top_p": 0.9, "rate": 0.01},  # nine tenths of the vocabulary, bins are full
    "logprobs 20": {"logprobs": 20},
}


def bench_sampling(table: Table, peak: float) -> None:
    """Logits of a large vocabulary to tokens: bytes are those of the passes over the logits, one or three."""
    for rows in (1, 16, 64, 256):
        logits_bytes = rows * VOCABULARY * 2
        calls = max(2, min(64, GIB // logits_bytes))
        logits = torch.randn(calls, rows, VOCABULARY, device="cuda").mul_(3).to(torch.bfloat16)
        at = torch.arange(rows, dtype=torch.int32, device="cuda")
        workspace, out = SamplingWorkspace(), TokensOut.empty(rows, 20, logits.device)
        for case, given in SAMPLING.items():
            tables, its = RowTables.empty(rows, VOCABULARY, logits.device), np.zeros(rows, ROW)
            its["stream"] = np.arange(rows, dtype=np.uint64) << np.uint64(32)
            its["top_p"], its["repetition"], its["logprobs"] = np.inf, 1, -1
            its["rate"], its["least"] = 1.4427, -np.inf
            for name, value in given.items():
                its[name] = value
            tables.rows.copy_(torch.from_numpy(its.view(np.uint8).reshape(rows, -1)))

            def work() -> None:
                for one in logits:  # noqa: B023 (called in this round only)
                    choose_tokens(one, out, workspace, tables, at, at, more=case != "greedy")  # noqa: B023

            table.row(
                "choose_tokens",
                f"{rows} x {VOCABULARY}, {case}",
                calls=calls,
                moved=calls * logits_bytes * (1 if case == "greedy" else 3),
                total_s=seconds(work),
                peak=peak,
            )


def bench_attention(table: Table, peak: float, quick: bool) -> None:
    """Decode attention, 32 query heads on 8, shuffled blocks of 16, a call for each layer, the plan outside; then with
    an exact plan."""
    cells = list(RIVAL_US)
    for sequences, context in cells[:4] if quick else cells:
        layer_bytes = sequences * context * 2 * KV_HEADS * HEAD_SIZE * 2
        layers = max(1, min(64, 2 * GIB // layer_bytes))  # each pass reads more than the L2 cache holds
        torch.cuda.empty_cache()
        pool = random_pool(sequences * context // BLOCK_TOKENS, layers)
        order = torch.randperm(len(pool), device=pool.device)
        tables = order.view(sequences, -1).to(torch.int32).contiguous()
        lens = torch.full((sequences,), context, dtype=torch.int32, device=pool.device)
        q = torch.randn(sequences, HEADS, HEAD_SIZE, device=pool.device).to(pool.dtype)
        out = torch.empty_like(q)
        calls = layers * -(-MIN_CALLS // layers)
        for exact in (False, True) if is_tiled(pool) else (False,):
            plan = plan_decode(pool, tables, lens, {None}, Workspace(), exact=exact)

            def work() -> None:
                for call in range(calls):  # noqa: B023
                    layer = call % layers  # noqa: B023
                    paged_decode_attention(q, pool, layer, tables, lens, HEAD_SIZE**-0.5, None, out, plan)  # noqa: B023

            total = seconds(work)
            rival = layer_bytes / (RIVAL_US[sequences, context] * 1e-6) / RIVAL_PEAK
            rate = table.row(
                "paged_decode_attention",
                f"{sequences} x {context}" + ", exact" * exact,
                calls=calls,
                moved=calls * layer_bytes,
                total_s=total,
                peak=peak,
            )
            print(f"{'':<58}{'share / best rival' + chr(39) + 's':>22} {rate / peak / rival:.3f}", flush=True)


def bench_prefill(quick: bool) -> None:
    """Whole prompts, 32 query heads on 8, shuffled blocks of 16, a call for each layer, the plan outside; with an exact
    plan; then torch's cuDNN attention over K and V gathered before."""
    cells = list(RIVAL_PREFILL_MS)
    for prompts, tokens in cells[:3] if quick else cells:
        layers = 4
        torch.cuda.empty_cache()
        pool = random_pool(prompts * tokens // BLOCK_TOKENS, layers)
        order = torch.randperm(len(pool), device=pool.device)
        tables = order.view(prompts, -1).to(torch.int32).contiguous()
        starts, lens = [i * tokens for i in range(prompts + 1)], [tokens] * prompts
        q = torch.randn(prompts * tokens, 32, HEAD_SIZE, device=pool.device).to(pool.dtype)
        out = torch.empty_like(q)
        plans = [
            plan_prefill(pool, tables, starts, lens, {None}, exact) for exact in (False, True)[: 1 + is_tiled(pool)]
        ]

        def paged(plan: PrefillPlan) -> None:
            for layer in range(layers):  # noqa: B023
                paged_prefill_attention(q, pool, layer, tables, starts, lens, HEAD_SIZE**-0.5, None, plan, out)  # noqa: B023

        kv = torch.randn(2, prompts, KV_HEADS, tokens, HEAD_SIZE, device=pool.device).to(pool.dtype)
        queries = q.view(prompts, tokens, 32, HEAD_SIZE).transpose(1, 2)

        def gathered() -> None:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                for _ in range(layers):  # noqa: B023
                    scaled_dot_product_attention(queries, kv[0], kv[1], is_causal=True, enable_gqa=True)  # noqa: B023

        work = 2 * prompts * tokens * (tokens + 1) * 32 * HEAD_SIZE  # multiply-adds of both products, two each
        ours = [
            ("paged_prefill_attention" + ", exact" * index, partial(paged, plan)) for index, plan in enumerate(plans)
        ]
        for name, run in (*ours, ("cuDNN, gathered before", gathered)):
            call_s = seconds(run) / layers
            case, rival = f"{prompts} x {tokens}", RIVAL_PREFILL_MS[prompts, tokens] / 1e3 / call_s
            print(f"{name:<32}{case:<26}{call_s * 1e6:>11.1f}{work / call_s / 1e12:>9.0f} TFLOP/s, rival {rival:.3f}")


def random_pool(num_blocks: int, layers: int) -> Tensor:
    pool = torch.empty((num_blocks, layers, 2, KV_HEADS, BLOCK_TOKENS, HEAD_SIZE), dtype=torch.bfloat16, device="cuda")
    step = max(1, GIB // pool[0].nbytes)
    for start in range(0, num_blocks, step):
        pool[start : start + step].normal_()
    return pool


def bench_small(table: Table, peak: float) -> None:
    """What is made of one pass over memory."""
    pool = random_pool(POOL_TOKENS // BLOCK_TOKENS, LAYERS)
    bench_write_kv(table, pool, peak)
    bench_layer(table, pool, peak)
    bench_block_copy(table, pool, peak)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases of attention")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    options = parser.parse_args()
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
    parts: dict[str, Callable[[], None]] = {
        "linear": lambda: bench_linear(table, reads),
        "chain": lambda: bench_layer_chain(table, reads),
        "sampling": lambda: bench_sampling(table, reads),
        "attention": lambda: bench_attention(table, reads, options.quick),
        "prefill": lambda: bench_prefill(options.quick),
        "small": lambda: bench_small(table, reads),
    }
    for name in options.only:
        parts[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
