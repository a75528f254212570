"""How long one step's sampling takes, from the table of parameters to the tokens on the host.

    PYTHONPATH=src python -P benchmarks/sampling.py [--vocab 4096] [--threads 1]

"take" is the host's share: the rows' parameters gathered, and their copy to the device begun. "sample" is the work on
the device, on a GPU between two events; "total" is the wall clock around both and the wait for the tokens. Medians.
"""

import argparse
import statistics
import sys
import time

import numpy as np
import torch
from torch import Tensor

from baton.core.request import Sampling
from baton.engine.device_table import DeviceSamplingTable, sampling_table
from baton.engine.sampler import SamplingRows, sample
from baton.engine.sampling_table import SamplingTable

CASES = {
    "greedy": Sampling(max_tokens=1000, temperature=0.0),
    "temperature": Sampling(max_tokens=1000, temperature=0.8),
    "top-k 40": Sampling(max_tokens=1000, temperature=0.8, top_k=40),
    "top-p .9": Sampling(max_tokens=1000, temperature=0.8, top_p=0.9),
    "all three": Sampling(max_tokens=1000, temperature=0.8, top_k=50, top_p=0.9, min_p=0.02),
    "penalties": Sampling(max_tokens=1000, temperature=0.0, repetition_penalty=1.1, frequency_penalty=0.2),
    "logprobs 5": Sampling(max_tokens=1000, temperature=0.0, logprobs=5),
}
SEQUENCES = (1, 16, 64, 256)
PROMPT_TOKENS, ANSWER_TOKENS = 512, 100
LEAST_CALLS, MOST_CALLS, LEAST_S = 3, 50, 0.5


def device_seconds(logits: Tensor, rows: SamplingRows) -> float:
    if not logits.is_cuda:
        begin = time.perf_counter()
        sample(logits, rows)
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    sample(logits, rows)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(logits: Tensor, table: SamplingTable | DeviceSamplingTable) -> tuple[float, float, float]:
    """Median seconds of take, sample and all."""
    count = len(logits)
    rows, takes, samples, totals = np.arange(count), [], [], []
    began = time.perf_counter()
    while len(totals) < LEAST_CALLS or (len(totals) < MOST_CALLS and time.perf_counter() - began < LEAST_S):
        positions = np.full(count, len(totals))
        begin = time.perf_counter()
        taken = table.take(rows, positions)
        took = time.perf_counter()
        sample(logits, taken).to_host().result()
        end = time.perf_counter()
        takes.append(took - begin)
        totals.append(end - begin)
        samples.append(device_seconds(logits, taken))
    return statistics.median(takes), statistics.median(samples), statistics.median(totals)


def bench(device: torch.device, vocab_size: int, dtype: torch.dtype) -> None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{name}, torch {torch.__version__}, {vocab_size} tokens, {str(dtype).removeprefix('torch.')}")
    print(f"{'case':<16}{'sequences':>10}{'take ms':>10}{'sample ms':>11}{'total ms':>10}")
    dice = np.random.default_rng(0)
    for case, params in CASES.items():
        for count in SEQUENCES:
            logits = torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
            table = sampling_table(count, vocab_size, device)
            for row in range(count):
                said = dice.integers(0, vocab_size, PROMPT_TOKENS + ANSWER_TOKENS)
                table.put(row, params, said[:PROMPT_TOKENS], said[PROMPT_TOKENS:].tolist())
            times = measure(logits.to(device, dtype), table)
            take, device_s, total = (seconds * 1e3 for seconds in times)
            print(f"{case:<16}{count:>10}{take:>10.3f}{device_s:>11.3f}{total:>10.3f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, action="append", help="4096 and 131072 if not given")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for vocab_size in options.vocab or (4096, 131072):
        bench(torch.device("cpu"), vocab_size, torch.float32)
        if torch.cuda.is_available():
            bench(torch.device("cuda", torch.cuda.current_device()), vocab_size, torch.bfloat16)
    return 0


if __name__ == "__main__":
    sys.exit(main())
