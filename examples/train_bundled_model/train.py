"""Train the target, then distil the draft from it, within a budget of minutes each. Needs torch and safetensors alone.

Reads data/tokens.npz and data/pack.json. Writes target.safetensors, draft.safetensors (bf16), a loss CSV each and
train.json. The learning rate follows the clock: warm-up, a plateau, then a fall to zero that ends with the budget.
"""

import argparse
import csv
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from model import CONTEXT, DRAFT, TARGET, Llama, num_parameters
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

HERE = Path(__file__).parent
SHORT = 1024  # sequence length of the first stage; the last stage trains at CONTEXT
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    name: str
    minutes: float
    lr: float
    batch_tokens: int
    long_from: float = 0.7  # share of the budget after which sequences are CONTEXT long
    fall_from: float = 0.5  # share of the budget after which the learning rate falls
    weight_decay: float = 0.1
    warmup_steps: int = 200
    evals: int = 12


class Corpus:
    """The packed documents, on the device, shuffled anew each epoch."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.summary = json.loads((folder / "pack.json").read_text())
        packed = np.load(folder / "tokens.npz")
        self.heldout = torch.from_numpy(packed["heldout"].astype(np.int64)).to(device)
        shift = len(packed["train"])
        self._tokens = np.concatenate([packed["train"], packed["chat"]])
        starts = np.concatenate([packed["train_starts"][:-1], packed["chat_starts"] + shift])
        self._documents = [slice(a, b) for a, b in itertools.pairwise(starts)]
        self._random = np.random.default_rng(1)
        self._device = device
        self.epochs = 0.0

    def batches(self, batch_tokens: int) -> Iterator[Callable[[int], tuple[Tensor, Tensor]]]:
        """Endless; each item, called with a sequence length, gives inputs and targets [batch_tokens / T, T]."""
        while True:
            order = self._random.permutation(len(self._documents))
            epoch = np.concatenate([self._tokens[self._documents[i]] for i in order])
            stream = torch.from_numpy(epoch.astype(np.int32)).to(self._device)
            first = int(self._random.integers(batch_tokens // 2))
            for at in range(first, len(stream) - batch_tokens - 1, batch_tokens):
                self.epochs += batch_tokens / len(stream)
                yield lambda t, at=at, stream=stream: (
                    stream[at : at + batch_tokens].view(-1, t).long(),
                    stream[at + 1 : at + batch_tokens + 1].view(-1, t).long(),
                )


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16)


def next_token_loss(model: Llama) -> Loss:
    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())

    return loss


def distil_loss(draft: Llama, target: Llama, share: float = 0.9) -> Loss:
    """Mostly the divergence from the target's distribution, for a draft is worth what the target accepts of it."""

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = target(inputs).flatten(0, 1).float().log_softmax(-1)
        logits = draft(inputs).flatten(0, 1).float()
        given = logits.log_softmax(-1)
        divergence = (wanted.exp() * (wanted - given)).sum(-1).mean()
        return share * divergence + (1 - share) * functional.nll_loss(given, targets.flatten())

    return loss


def windows(tokens: Tensor, length: int = CONTEXT) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets [1, T], every token a target once."""
    for at in range(0, len(tokens) - 1, length):
        piece = tokens[at : at + length + 1]
        yield piece[None, :-1], piece[None, 1:]


@torch.no_grad()
def heldout_bits(model: Llama, corpus: Corpus) -> float:
    """Bits per byte of held-out text, in windows of CONTEXT tokens."""
    nats = 0.0
    with autocast(corpus.heldout.device):
        for inputs, targets in windows(corpus.heldout):
            nats += functional.cross_entropy(model(inputs)[0].float(), targets[0], reduction="sum").item()
    return nats / math.log(2) / corpus.summary["heldout_bytes"]


@torch.no_grad()
def agreement(draft: Llama, target: Llama, corpus: Corpus) -> tuple[float, float]:
    """Share of held-out positions where a drafted token is accepted, at temperature 1, and greedily."""
    accepted, same, count = 0.0, 0.0, 0
    with autocast(corpus.heldout.device):
        for inputs, _ in windows(corpus.heldout):
            p, q = (model(inputs)[0].float().softmax(-1) for model in (target, draft))
            accepted += torch.minimum(p, q).sum().item()
            same += (p.argmax(-1) == q.argmax(-1)).sum().item()
            count += inputs.numel()
    return accepted / count, same / count


def learning_rate(plan: Plan, step: int, spent: float) -> float:
    """spent: the share of the budget that is gone."""
    rising = min(1.0, (step + 1) / plan.warmup_steps)
    falling = 1.0 if spent < plan.fall_from else (1.0 - spent) / (1.0 - plan.fall_from)
    return plan.lr * min(rising, max(falling, 0.0))


def optimiser(model: Llama, plan: Plan, device: torch.device) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=plan.lr,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )


def compiled(loss: Loss, corpus: Corpus, plan: Plan, lengths: tuple[int, ...]) -> Loss:
    """The loss compiled for each sequence length, and tried; the plain one where compiling fails."""
    if corpus.heldout.device.type != "cuda":
        return loss
    try:
        fast = torch.compile(loss, dynamic=False)
        for t in lengths:
            began = time.monotonic()
            inputs = torch.zeros(plan.batch_tokens // t, t, dtype=torch.long, device=corpus.heldout.device)
            with autocast(inputs.device):
                fast(inputs, inputs).backward()
            torch.cuda.synchronize()
            print(f"{plan.name}: compiled for {t} tokens in {time.monotonic() - began:.0f} s", flush=True)
        return fast
    except Exception as error:  # any failure of the compiler: slower is better than nothing
        print(f"{plan.name}: not compiled: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return loss


def fit(
    model: Llama, loss: Loss, corpus: Corpus, plan: Plan, out: Path, short: int = SHORT, long: int = CONTEXT
) -> float:
    """Train until the budget, compiling included, is spent; leave the best weights in the model and on disk."""
    began = time.monotonic()
    device = corpus.heldout.device
    deadline = began + 60 * plan.minutes
    run = compiled(loss, corpus, plan, (short, long))
    model.zero_grad(set_to_none=True)
    adam = optimiser(model, plan, device)
    batches = corpus.batches(plan.batch_tokens)
    started, epochs = time.monotonic(), corpus.epochs
    best, best_weights, recent, step, next_eval, spent = math.inf, {}, [], 0, 1 / plan.evals, 0.0
    with open(out / f"{plan.name}_loss.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "tokens", "epochs", "seconds", "sequence", "lr", "train_loss", "heldout_bits_per_byte"])
        while True:
            if step % 10 == 0:  # the clock means little while kernels are queued
                if device.type == "cuda":
                    torch.cuda.synchronize()
                spent = (time.monotonic() - started) / max(deadline - started, 1e-9)
            t = long if spent >= plan.long_from else short
            if spent >= min(next_eval, 1.0) and recent:
                bits = heldout_bits(model, corpus)
                train_loss = torch.stack(recent).mean().item()
                seconds = time.monotonic() - started
                rows.writerow(
                    [
                        step,
                        step * plan.batch_tokens,
                        round(corpus.epochs - epochs, 2),
                        round(seconds, 1),
                        t,
                        f"{adam.param_groups[0]['lr']:.2e}",
                        round(train_loss, 4),
                        round(bits, 4),
                    ]
                )
                file.flush()
                print(
                    f"{plan.name}: step {step} {step * plan.batch_tokens / 1e6:.0f}M tokens "
                    f"({step * plan.batch_tokens / seconds / 1e6:.2f}M/s) loss {train_loss:.4f} "
                    f"held out {bits:.4f} bits a byte",
                    flush=True,
                )
                recent.clear()
                while next_eval <= spent:
                    next_eval += 1 / plan.evals
                if bits < best:
                    best, best_weights = (
                        bits,
                        {k: v.detach().to(torch.bfloat16, copy=True) for k, v in model.state_dict().items()},
                    )
                    save_file(
                        {k: v.cpu().contiguous() for k, v in best_weights.items()},
                        out / f"{plan.name}.safetensors",
                        metadata={"format": "pt"},
                    )
                if spent >= 1.0:
                    break
            for group in adam.param_groups:
                group["lr"] = learning_rate(plan, step, spent)
            with autocast(device):
                value = run(*next(batches)(t))
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            adam.zero_grad(set_to_none=True)
            recent.append(value.detach())
            step += 1
    model.load_state_dict({k: v.float() for k, v in best_weights.items()})
    return heldout_bits(model, corpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.5, help="for the target")
    parser.add_argument("--draft-minutes", type=float, default=2.0)
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--draft-lr", type=float, default=4e-3)
    parser.add_argument("--tiny", action="store_true", help="try the code on a CPU: short sequences")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(args.data, device)
    if args.tiny:
        corpus.heldout = corpus.heldout[:5000]
    lengths = (128, 256) if args.tiny else (SHORT, CONTEXT)
    began = time.monotonic()

    target = Llama(TARGET).to(device)
    print(f"target: {num_parameters(target):,} parameters on {device}", flush=True)
    plan = Plan(name="target", minutes=args.minutes, lr=args.lr, batch_tokens=args.batch_tokens)
    report: dict[str, float] = {"target_parameters": num_parameters(target)}
    report["target_bits_per_byte"] = fit(target, next_token_loss(target), corpus, plan, args.out, *lengths)
    report["target_seconds"] = time.monotonic() - began

    target.requires_grad_(False)
    draft = Llama(DRAFT).to(device)
    print(f"draft: {num_parameters(draft):,} parameters", flush=True)
    plan = Plan(
        name="draft", minutes=args.draft_minutes, lr=args.draft_lr, batch_tokens=args.batch_tokens, weight_decay=0.01
    )
    report["draft_parameters"] = num_parameters(draft)
    report["draft_bits_per_byte"] = fit(draft, distil_loss(draft, target), corpus, plan, args.out, *lengths)
    report["draft_accepted"], report["draft_same_greedy"] = agreement(draft, target, corpus)
    report["seconds"] = time.monotonic() - began
    report = {name: round(value, 4) for name, value in report.items()}
    (args.out / "train.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1), flush=True)


if __name__ == "__main__":
    main()
