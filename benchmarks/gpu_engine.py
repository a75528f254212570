"""The engine on one GPU, on a model of an 8B's shape with random weights, beside what vLLM 0.26 did on an H200.

    PYTHONPATH=src python -P benchmarks/gpu_engine.py [--only a e] [--json FILE] [--kernels] [--deterministic]

    a  1 x (128 in, 256 out): ms per token             d  32 x (4096 in, 1 out): prompt tokens per second
    b  256 x (1024 in, 256 out): output tokens per s   e  a step of 16, 64, 256 sequences at a context of 2,000: ms
    c  512 x (128 in, 512 out): output tokens per s    f  256 live, 512 more come as others go: idle share alone

Greedy, nobody ends early, no prefix is shared. Each workload runs on fewer tokens first, to warm up. Beside each figure
is its share of the floor: all weights and the mean KV read once a step, at the rate of plain reads, and the prompts'
products at the rate that is sustained for 3 s; both rates are measured in the same run.

"idle" is the share of a workload's time that the GPU had nothing to do between two steps, by the GPU's own clock: from
the end of one step's sampling to the start of the next step. In f prompts have 16 to 1,024 tokens, answers 16 to 512.

--kernels: which kernels the time of a decode step goes to, for 1, 16, 64, 256 and 512 sequences, before all else. Those
that overlap are each counted in full.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from baton.core.ids import SequenceId
from baton.core.request import Sampling
from baton.core.tickets import Geometry
from baton.engine.continuous_batch import ContinuousBatch
from baton.engine.device_clock import DeviceTime
from baton.engine.engine import Engine
from baton.engine.kv_cache import KvCache
from baton.engine.models.config import ModelConfig
from baton.engine.models.decoder import Model, read_mlp, read_model
from baton.engine.models.llama import read_attention
from baton.engine.models.weights import Weights
from baton.engine.parallel.alone import Alone
from baton.engine.parallel.communicator import Communicator
from baton.engine.policies import policy
from baton.engine.sequence import Sequence

GIB = 1 << 30
SHAPE_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# vLLM 0.26 on one H200: (figure, unit, more is better)
RIVAL = {"a": (4.945, "ms/token", False), "b": (6094.0, "tok/s", True), "c": (20456.0, "tok/s", True),
         "d": (40912.0, "tok/s", True), "e 16": (6.07, "ms/step", False), "e 64": (9.53, "ms/step", False),
         "e 256": (25.5, "ms/step", False), "f": (0.0, "tok/s", True)}  # fmt: skip


class RandomFiles:
    """Stands where a checkpoint's files would: every tensor is there, of the shape asked for."""

    total_bytes = 0

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._random = torch.Generator(device).manual_seed(0)
        self._device, self._dtype = device, dtype

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...]) -> Tensor:
        size = [len(range(*one.indices(length))) for one, length in zip(part, shape, strict=True)]
        tensor = torch.empty(size, dtype=self._dtype, device=self._device)
        return tensor.fill_(1) if "norm" in name else tensor.normal_(0, 0.02, generator=self._random)


def random_model(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    positions: int,
    communicator: Communicator | None = None,
    exact: bool = False,
) -> Model:
    """communicator: with the ranks that have the other parts; None: there are none."""
    files = RandomFiles(device, dtype)
    weights = Weights(files, dtype, device, communicator or Alone(), exact=exact)  # type: ignore[arg-type]
    return read_model(weights, config, positions, read_attention, read_mlp)


@dataclass(frozen=True)
class Row:
    workload: str
    figure: float
    unit: str
    to_rival: float  # how many times as good
    of_floor: float  # how much of what the hardware allows
    idle: float  # share of the time, between steps


class Bench:
    def __init__(self, engine: Engine, reads: float, products: float) -> None:
        """reads: bytes per second; products: floating point operations per second, sustained."""
        self._engine = engine
        self._reads, self._products = reads, products
        config = engine.config
        model = engine_bytes(config)
        self._weights, self._kv_token = model
        self._count = 0

    def run(self, count: int, prompt: int, answer: int, step_tokens: int) -> tuple[float, list[float], list[float]]:
        """(seconds, ms of each step, ms of each gap)."""
        batch = self._batch(count, prompt, answer, step_tokens)
        torch.cuda.synchronize()
        began = time.perf_counter()
        steps, gaps = run_out(self._engine, batch)
        torch.cuda.synchronize()
        return time.perf_counter() - began, steps, gaps

    def _batch(self, count: int, prompt: int, answer: int, step_tokens: int) -> ContinuousBatch:
        batch = batch_of(self._engine, count, prompt, answer, step_tokens, self._count)
        self._count += count
        return batch

    def decode_floor_s(self, sequences: float, context: float) -> float:
        return (self._weights + sequences * context * self._kv_token) / self._reads

    def a(self) -> list[Row]:
        self.run(1, 128, 16, 512)
        took, steps, gaps = self.run(1, 128, 257, 512)
        per_token = statistics.median(steps[8:]) + statistics.median(gaps[8:])
        return [self._row("a", per_token, self.decode_floor_s(1, 256) * 1e3 / per_token, gaps, took)]

    def b(self) -> list[Row]:
        return self._throughput("b", 256, 1024, 256)

    def c(self) -> list[Row]:
        return self._throughput("c", 512, 128, 512)

    def _throughput(self, name: str, count: int, prompt: int, answer: int) -> list[Row]:
        self.run(count, prompt, 4, 16384)
        took, _, gaps = self.run(count, prompt, answer, 16384)
        rate = count * answer / took
        floor = answer * self.decode_floor_s(count, prompt + answer / 2) + self._prefill_floor_s(count, prompt)
        return [self._row(name, rate, floor / took, gaps, took)]

    def d(self) -> list[Row]:
        self.run(4, 4096, 1, 16384)
        took, _, gaps = self.run(32, 4096, 1, 16384)
        return [self._row("d", 32 * 4096 / took, self._prefill_floor_s(32, 4096) / took, gaps, took)]

    def e(self) -> list[Row]:
        rows = []
        for count in (16, 64, 256):
            _, steps, gaps = self.run(count, 2000, 97, 16384)
            per_step = statistics.median(steps[-80:-8])
            floor = self.decode_floor_s(count, 2048) * 1e3
            rows.append(self._row(f"e {count}", per_step, floor / per_step, gaps[-80:-8], sum(steps[-80:-8]) / 1e3))
        return rows

    def f(self) -> list[Row]:
        """256 are live at any time, until 768 have come."""
        numbers = np.random.default_rng(0)
        batch = ContinuousBatch(self._engine, policy("fcfs"), step_tokens=2048)
        vocabulary, left, live = self._engine.config.vocab_size, 768, 0
        sizes = [(int(numbers.integers(16, 1025)), int(numbers.integers(16, 513))) for _ in range(left)]
        prompts = [tuple(numbers.integers(0, vocabulary, prompt).tolist()) for prompt, _ in sizes]
        times: list[DeviceTime] = []
        tokens, began = 0, time.perf_counter()
        while left or live:
            while left and live < 256:
                left, live = left - 1, live + 1
                sampling = Sampling(max_tokens=sizes[left][1], temperature=0.0)
                batch.add(Sequence(SequenceId(f"f/{left}"), prompts[left], sampling))
            result = batch.step(time.perf_counter())
            assert result is not None, "nothing runs, and not all have ended"
            live -= len(result.ended)
            tokens += len(result.tokens)
            times += result.device
        took = time.perf_counter() - began
        return [self._row("f", tokens / took, 0.0, [one.idle_s * 1e3 for one in times], took)]

    def kernels(self, count: int, prompt: int, steps: int = 8, most: int = 14) -> None:
        """Prints what kernels decode steps of so many sequences run, the longest first: us and number a step, name."""
        batch = self._batch(count, prompt, steps + 80, 16384)  # the first is there when the last comes
        while batch.waiting or batch.tokens_ahead():
            batch.step(0.0)
        for _ in range(4):
            batch.step(0.0)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(steps):
                batch.step(0.0)
            torch.cuda.synchronize()
        while batch.step(0.0) is not None:
            pass
        self._engine.ledger.drop_cached()
        found = sorted(profiler.key_averages(), key=lambda one: -one.self_device_time_total)
        total = sum(one.self_device_time_total for one in found)
        print(f"kernels of a step of {count} sequences at {prompt} tokens, {total / steps / 1e3:.2f} ms together")
        for one in found[:most]:
            print(f"  {one.self_device_time_total / steps:>9.1f} us {one.count / steps:>7.1f} x  {one.key[:90]}")

    def _prefill_floor_s(self, count: int, prompt: int) -> float:
        config = self._engine.config
        products = 2 * self._weights / 2 * prompt  # the head's is counted too, though but one token of each needs it
        products -= 2 * config.vocab_size * config.hidden_size * (prompt - 1)
        attention = 2 * config.num_layers * config.num_heads * config.head_size * prompt * prompt
        return count * (products + attention) / self._products

    def _row(self, name: str, figure: float, of_floor: float, gaps: list[float], took: float) -> Row:
        rival, unit, more = RIVAL[name]
        to_rival = (figure / rival if more else rival / figure) if rival else 0.0
        return Row(name, figure, unit, to_rival, of_floor, sum(gaps) / 1e3 / took)


def batch_of(engine: Engine, count: int, prompt: int, answer: int, step_tokens: int, before: int) -> ContinuousBatch:
    """With so many sequences of random tokens, greedy, no two alike. before: others that have come; they differ too."""
    batch = ContinuousBatch(engine, policy("fcfs"), step_tokens=step_tokens)
    numbers = torch.Generator().manual_seed(count + before)
    for at in range(count):
        ids = tuple(torch.randint(0, engine.config.vocab_size, (prompt,), generator=numbers).tolist())
        sampling = Sampling(max_tokens=answer, temperature=0.0)
        batch.add(Sequence(SequenceId(f"r/{before + at}"), ids, sampling))
    return batch


def run_out(engine: Engine, batch: ContinuousBatch) -> tuple[list[float], list[float]]:
    """Until all have ended: (ms of each step, ms of each gap). Nothing of it stays in the prefix cache."""
    times: list[DeviceTime] = []
    while (result := batch.step(time.perf_counter())) is not None:
        times += result.device
    engine.ledger.check()
    engine.ledger.drop_cached()
    return [one.busy_s * 1e3 for one in times], [one.idle_s * 1e3 for one in times]


def engine_bytes(config: ModelConfig) -> tuple[int, int]:
    """(bytes of all weights that a step reads, of one token's KV), bfloat16."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_size
    layer = config.hidden_size * (heads + config.num_heads * config.head_size + 3 * config.intermediate_size)
    weights = config.num_layers * layer + config.vocab_size * config.hidden_size
    return 2 * weights, 2 * 2 * config.num_layers * config.num_kv_heads * config.head_size


def products_per_s(device: torch.device, size: int = 8192, for_s: float = 3.0) -> float:
    """Of bfloat16 matrices, for so long that the card's power limit tells."""
    a, b, c = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(3))
    torch.mm(a, b, out=c)
    torch.cuda.synchronize()
    began, rounds, last = time.perf_counter(), 0, 0.0
    while time.perf_counter() - began < for_s:
        start = time.perf_counter()
        for _ in range(50):
            torch.mm(a, b, out=c)
        torch.cuda.synchronize()
        last, rounds = time.perf_counter() - start, rounds + 1
    return 50 * 2 * size**3 / last


def config_of(shape: dict[str, object]) -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        save_file({"none": torch.zeros(1)}, Path(folder) / "model.safetensors")  # a configuration alone is no model
        return ModelConfig.from_dir(Path(folder))


def geometry_of(config: ModelConfig) -> Geometry:
    return Geometry(
        num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_size=config.head_size, block_tokens=16,
        dtype="bfloat16", fingerprint="random",
    )  # fmt: skip


def build_engine(
    shape: dict[str, object], device: torch.device, max_batch: int, kv_bytes: int, exact: bool = False
) -> Engine:
    config = config_of(shape)
    geometry = geometry_of(config)
    with torch.inference_mode():
        model = random_model(config, device, torch.bfloat16, 8192, exact=exact)
        return Engine(model, KvCache(kv_bytes // geometry.block_bytes, geometry, device), 8192, max_batch)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list("abcdef"), default=list("abcdef"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--deterministic", action="store_true", help="exact mode: its price is the difference")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing to measure")
        return 0
    from kernels import Table, probe  # beside this file

    device = torch.device("cuda", torch.cuda.current_device())
    torch.set_float32_matmul_precision("highest")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    with tempfile.TemporaryDirectory() as folder:
        reads = probe(Table(), Path(folder))
    products = products_per_s(device)
    print(f"products, 8192 cubed, sustained: {products / 1e12:.0f} TFLOP/s")
    torch.cuda.empty_cache()
    began = time.perf_counter()
    free = torch.cuda.mem_get_info()[0] - 20 * GIB  # of the weights, the graphs, what a large step needs
    engine = build_engine(SHAPE_8B, device, 512, free, options.deterministic)
    torch.cuda.synchronize()
    print(f"engine ready in {time.perf_counter() - began:.1f} s, {engine.kv_cache.num_blocks} blocks")
    bench = Bench(engine, reads, products)
    for count, prompt in ((1, 128), (16, 2000), (64, 2000), (256, 2000), (512, 128)) if options.kernels else ():
        bench.kernels(count, prompt)
    workloads: dict[str, Callable[[], list[Row]]] = {name: getattr(bench, name) for name in options.only}
    rows: list[Row] = []
    print(f"{'workload':<10}{'figure':>10} {'unit':<10}{'/ rival':>8}{'/ floor':>8}{'idle':>7}")
    for work in workloads.values():
        for row in work():
            rows.append(row)
            print(
                f"{row.workload:<10}{row.figure:>10.2f} {row.unit:<10}{row.to_rival:>8.3f}{row.of_floor:>8.3f}"
                f"{row.idle:>7.1%}",
                flush=True,
            )
    if options.json:
        options.json.write_text(
            json.dumps({"card": torch.cuda.get_device_name(), "reads": reads, "rows": [asdict(row) for row in rows]})
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
