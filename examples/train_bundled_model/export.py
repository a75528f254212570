"""Turn what train.py wrote into the two folders under models/, and the figures of README.md.

python export.py --results <train.py's --out> [--models ../../models]
"""

import argparse
import csv
import json
import shutil
from pathlib import Path

import evaluate
import figures
import torch
from model import CONTEXT, DRAFT, HEAD, NORM_EPS, TARGET, THETA, Llama, Shape, num_parameters
from safetensors.torch import load_file
from train_tokenizer import BEGIN, END, PAD, TURN_END
from transformers import GenerationConfig, LlamaConfig

HERE = Path(__file__).parent
NAMES = {"target": "baton-docs-6m", "draft": "baton-docs-1m"}
SHAPES = {"target": TARGET, "draft": DRAFT}

CARD = """# {name}

A Llama of {parameters:,} parameters that has read {megabytes:.0f} MB of the documentation of open source software.
It is here so that Baton has something to serve at once, on any machine; it is {role}.

| | |
|---|---|
| architecture | LlamaForCausalLM: {layers} layers, hidden size {hidden}, tied embeddings |
| attention | {heads} query heads over {kv_heads} KV heads of size 64 |
| context | {context} tokens, and trained at that length |
| vocabulary | 4096, byte-level BPE |
| weights | bf16 |
| held-out text | {bits:.3f} bits per byte |

**Data.** {packages} packages of documentation, from Python to SymPy; the list with licences and notices is in
`examples/train_bundled_model/NOTICE.md`, the way it was made in the README beside it.

**Licence.** The weights are under this repository's licence. The notices of the texts are kept in that NOTICE.md.

**Limits.** It writes the sound of documentation and not its truth: names, signatures and numbers are invented. It knows
English and a little code, keeps no thread for long, and was not taught to refuse or to be safe. Use it to test a
server, never for an answer.
"""
ROLES = {
    "target": "the larger of a pair, of which `baton-docs-1m` is the draft",
    "draft": "the draft for `baton-docs-6m` in speculative decoding, distilled from it, and of little use alone",
}


def write_config(shape: Shape, ids: dict[str, int], folder: Path) -> None:
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=HEAD,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=ids[BEGIN],
        eos_token_id=ids[END],
        pad_token_id=ids[PAD],
        dtype="bfloat16",
    ).save_pretrained(folder)
    GenerationConfig(
        bos_token_id=ids[BEGIN],
        eos_token_id=[ids[END], ids[TURN_END]],
        pad_token_id=ids[PAD],
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        max_new_tokens=256,  # it seldom ends by itself
    ).save_pretrained(folder)


def export(kind: str, results: Path, data: Path, models: Path) -> Path:
    """Write one model's folder; its weights are checked against the shape on the way."""
    folder = models / NAMES[kind]
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(results / f"{kind}.safetensors")
    model = Llama(SHAPES[kind])
    model.load_state_dict(weights)
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())
    shutil.copyfile(results / f"{kind}.safetensors", folder / "model.safetensors")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(data / "tokenizer" / file, folder / file)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    write_config(SHAPES[kind], vocabulary, folder)
    print(f"{folder.name}: {num_parameters(model):,} parameters")
    return folder


def write_card(kind: str, folder: Path, figures_: dict[str, dict[str, float]]) -> None:
    shape, sources = SHAPES[kind], json.loads((HERE / "sources.json").read_text())
    (folder / "README.md").write_text(
        CARD.format(
            name=NAMES[kind],
            parameters=num_parameters(Llama(shape)),
            role=ROLES[kind],
            layers=shape.layers,
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            context=CONTEXT,
            bits=figures_["bits_per_byte"][NAMES[kind]],
            packages=len(sources),
            megabytes=sum(source["bytes"] for source in sources.values()) / 1e6,
        )
    )


def merge_losses(results: Path) -> None:
    """One loss.csv of both models' curves."""
    with open(HERE / "loss.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        for kind, name in NAMES.items():
            with open(results / f"{kind}_loss.csv") as part:
                for number, row in enumerate(csv.reader(part)):
                    if number or kind == "target":
                        rows.writerow([name if number else "model", *row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--models", type=Path, default=HERE.parents[1] / "models")
    args = parser.parse_args()
    folders = {kind: export(kind, args.results, args.data, args.models) for kind in NAMES}
    merge_losses(args.results)
    measured = evaluate.evaluate(folders["target"], folders["draft"], args.data)
    measured["training"] = json.loads((args.results / "train.json").read_text())
    (HERE / "results.json").write_text(json.dumps(measured, indent=1) + "\n")
    for kind, folder in folders.items():
        write_card(kind, folder, measured)
    figures.draw_losses(HERE / "loss.csv", HERE / "loss.svg")
    figures.fill_readme(HERE / "README.md", measured, json.loads((HERE / "sources.json").read_text()))


if __name__ == "__main__":
    main()
