"""Train the tokenizer on train.txt, then pack every text into data/tokens.npz and data/pack.json for train.py.

Byte-level BPE, 4096 tokens with the special ones. It adds <|begin|> itself, as Llama's does.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
VOCAB = 4096
BEGIN, END, PAD, SYSTEM, USER, ASSISTANT, TURN_END = SPECIAL = (
    "<|begin|>",
    "<|end|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|turn_end|>",
)
# Words with the space before them, digits one by one, runs of punctuation, line breaks, runs of spaces.
PIECES = r"""'(?:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|turn_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def texts(path: Path) -> Iterator[str]:
    """The file's documents."""
    yield from (document.rstrip("\n") for document in path.read_text("utf-8").split("\f") if document.strip())


def chat_text(turns: list[dict[str, str]]) -> str:
    """What the chat template makes of a conversation, less the <|begin|> in front, which the tokenizer adds."""
    return "".join(f"<|{turn['role']}|>{turn['content']}{TURN_END}" for turn in turns)


def train(path: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts(path),
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        ),
    )
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, begin)]
            ),
        ]
    )
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": BEGIN,
                "eos_token": END,
                "pad_token": PAD,
                "additional_special_tokens": [SYSTEM, USER, ASSISTANT, TURN_END],
                "model_max_length": context,
                "clean_up_tokenization_spaces": False,
                "chat_template": CHAT_TEMPLATE,
                "model_input_names": ["input_ids", "attention_mask"],
            },
            indent=2,
        )
        + "\n"
    )


def pack(tokenizer: Tokenizer, documents: Iterator[str]) -> tuple[np.ndarray, np.ndarray]:
    """tokens [T] u16, each document between <|begin|> and <|end|>, and where each document starts [D + 1] i64."""
    end = tokenizer.token_to_id(END)
    rows = [np.array([*encoding.ids, end], np.uint16) for encoding in tokenizer.encode_batch(list(documents))]
    return np.concatenate(rows), np.cumsum([0, *map(len, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--chats", type=int, default=2, help="keep one conversation in this many")
    args = parser.parse_args()
    tokenizer = train(args.data / "train.txt")
    save(tokenizer, args.data / "tokenizer", context=4096)

    chats = [json.loads(line) for line in (args.data / "chat.jsonl").open()][:: args.chats]
    arrays, summary = {}, {"vocab": VOCAB, "begin": tokenizer.token_to_id(BEGIN), "end": tokenizer.token_to_id(END)}
    kinds = {
        "train": texts(args.data / "train.txt"),
        "heldout": texts(args.data / "heldout.txt"),
        "chat": map(chat_text, chats),
    }
    for name, documents in kinds.items():
        listed = list(documents)
        arrays[name], arrays[name + "_starts"] = pack(tokenizer, iter(listed))
        summary[name + "_bytes"] = sum(len(text.encode()) for text in listed)
        tokens = len(arrays[name]) - 2 * len(listed)
        print(
            f"{name:8} {len(listed):6} documents {len(arrays[name]):9} tokens "
            f"{summary[name + '_bytes'] / tokens:.2f} bytes a token"
        )
    np.savez_compressed(args.data / "tokens.npz", **arrays)
    (args.data / "pack.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"tokens.npz {(args.data / 'tokens.npz').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
