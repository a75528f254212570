"""What the two models are worth, as transformers loads them: bits per byte of held-out text beside gzip and xz, how
often a drafted token is accepted, whether the far end of the context helps, and samples.
"""

import argparse
import gzip
import json
import lzma
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
CONTEXT = 4096
BUCKETS = ((0, 256), (256, 1024), (1024, 2048), (2048, 4096))
PROMPTS = ("The asyncio module provides", "To create an index on a table,", "Returns True if", "fn main() {")
QUESTIONS = ("What does os.path.join do?", "What is a foreign key?", "Who are you?", "Tell me about threads in Python.")


def compressed_bits(text: bytes, before: bytes) -> dict[str, float]:
    """Bits per byte of the text; the last of them with the training text read first, as the models have."""
    read_first = len(lzma.compress(before + text, preset=9)) - len(lzma.compress(before, preset=9))
    sizes = {
        "gzip -9": len(gzip.compress(text, 9)),
        "xz -9": len(lzma.compress(text, preset=9)),
        "xz -9, after the training text": read_first,
    }
    return {name: round(8 * size / len(text), 4) for name, size in sizes.items()}


@torch.no_grad()
def compare(models: dict[str, Any], tokens: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Nats per token [windows, CONTEXT] of each model, and how the second agrees with the first."""
    nats: dict[str, list[Tensor]] = {name: [] for name in models}
    accepted, same, count = 0.0, 0, 0
    for at in range(0, len(tokens) - 1, CONTEXT):
        inputs, targets = tokens[at : at + CONTEXT + 1][:-1], tokens[at : at + CONTEXT + 1][1:]
        scores = {name: model(inputs[None]).logits[0].float().log_softmax(-1) for name, model in models.items()}
        for name, score in scores.items():
            nats[name].append(functional.nll_loss(score, targets, reduction="none"))
        target, draft = scores.values()
        accepted += torch.minimum(target, draft).exp().sum().item()
        same += int((target.argmax(-1) == draft.argmax(-1)).sum())
        count += len(inputs)
    padded = {
        name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))
        for name, rows in nats.items()
    }
    return padded, {
        "accepted_at_temperature_1": round(accepted / count, 4),
        "same_greedy_token": round(same / count, 4),
    }


def sample(model: Any, tokenizer: Any) -> list[dict[str, str]]:
    """Continuations and answers, with the sampling defaults of generation_config.json."""
    torch.manual_seed(7)
    made = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=90, attention_mask=torch.ones_like(ids))
        made.append({"prompt": prompt, "text": tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)})
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        out = model.generate(ids, max_new_tokens=120, attention_mask=torch.ones_like(ids))
        made.append({"user": question, "assistant": tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)})
    return made


def evaluate(target: Path, draft: Path, data: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(target)
    models = {
        path.name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (target, draft)
    }
    documents = [text.rstrip("\n") for text in (data / "heldout.txt").read_text("utf-8").split("\f") if text.strip()]
    tokens = torch.tensor([i for ids in tokenizer(documents).input_ids for i in (*ids, tokenizer.eos_token_id)])
    plain = "\n".join(documents).encode()
    num_bytes = sum(len(text.encode()) for text in documents)

    nats, agreement = compare(models, tokens)
    bits = {name: round(rows.nansum().item() / math.log(2) / num_bytes, 4) for name, rows in nats.items()}
    far = {
        name: {f"{a} to {b}": round(rows[:, a:b].nanmean().item(), 3) for a, b in BUCKETS}
        for name, rows in nats.items()
    }
    result = {
        "parameters": {name: model.num_parameters() for name, model in models.items()},
        "heldout": {"documents": len(documents), "bytes": num_bytes, "tokens": len(tokens)},
        "bits_per_byte": bits | compressed_bits(plain, (data / "train.txt").read_bytes()),
        "nats_per_token_by_position": far,
        "draft_agreement": agreement,
        "samples": sample(models[target.name], tokenizer),
    }
    print(json.dumps(result, indent=1))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    models = HERE.parents[1] / "models"
    parser.add_argument("--target", type=Path, default=models / "baton-docs-6m")
    parser.add_argument("--draft", type=Path, default=models / "baton-docs-1m")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    args = parser.parse_args()
    evaluate(args.target, args.draft, args.data)


if __name__ == "__main__":
    main()
