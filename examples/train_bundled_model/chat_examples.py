"""Questions and answers made from documentation: a term and the first paragraph said about it."""

import hashlib
import random
import re
from dataclasses import dataclass

from clean_html import Block

Turn = dict[str, str]

SYSTEM = (
    "You are a helpful assistant.",
    "You answer questions about {title}.",
    "You are an assistant who knows the documentation of {title}.",
    "Answer briefly.",
)
ASK_NAME = (
    "What does {name} do?",
    "What is {name}?",
    "Explain {name}.",
    "Tell me about {name} in {title}.",
    "How do I use {name}?",
    "What is {name} for?",
    "Describe {name}.",
)
ASK_TOPIC = (
    "Tell me about {name}.",
    "Explain this topic from {title}: {name}.",
    "{title}: {name}?",
    "What should I know about {name} in {title}?",
    "Write a paragraph about {name}.",
)
GREETINGS = (
    ("Hello!", "Hello! Ask me something about the documentation."),
    ("Hi", "Hi! What would you like to know?"),
    ("Who are you?", "I am a very small language model, trained on documentation of open source software."),
    ("Thanks!", "You are welcome."),
    ("Thank you.", "You are welcome. Is there anything else?"),
)
NAME = re.compile(r"^[A-Za-z_][\w.]*[\w]$")
VAGUE = {
    "description",
    "examples",
    "parameters",
    "overview",
    "introduction",
    "synopsis",
    "methods",
    "attributes",
    "syntax",
    "compatibility",
    "return value",
    "function",
    "returns",
    "notes",
    "summary",
    "arguments",
    "background",
    "exports",
}
MAX_PAIRS = 24  # from one document


@dataclass(frozen=True, slots=True)
class Document:
    name: str
    title: str  # of the project it documents
    blocks: list[Block]

    def text(self) -> str:
        return "\n\n".join(block.text for block in self.blocks)


def pairs(document: Document, chance: random.Random) -> list[tuple[str, str]]:
    """A question and its answer for each term or heading that prose follows at once."""
    found = []
    for block, after in zip(document.blocks, document.blocks[1:], strict=False):
        if after.kind not in {"p", "dd"} or not 60 <= len(after.text) <= 900 or not after.text[0].isupper():
            continue
        if block.kind == "dt" and "." in block.anchor and NAME.match(block.anchor):
            ask, name = chance.choice(ASK_NAME), block.anchor
        elif block.kind == "dt" and NAME.match(block.text) and len(block.text) < 40:
            ask, name = chance.choice(ASK_NAME), block.text
        elif block.kind[0] == "h" and 8 <= len(block.text) <= 60 and block.text.lower() not in VAGUE:
            ask, name = chance.choice(ASK_TOPIC), re.sub(r"^[\d.]+\s*", "", block.text)
        else:
            continue
        found.append(
            (ask.format(name=name, title=document.title), after.text.rstrip(":") + "." * after.text.endswith(":"))
        )
    return found if len(found) <= MAX_PAIRS else chance.sample(found, MAX_PAIRS)


def conversations(document: Document) -> list[list[Turn]]:
    """The document's pairs as conversations of one to three exchanges, some with a system turn or a greeting."""
    chance = random.Random(hashlib.blake2b(document.name.encode(), digest_size=8).digest())
    left, made = pairs(document, chance), []
    chance.shuffle(left)
    while left:
        exchanges = [left.pop() for _ in range(min(len(left), chance.choice((1, 1, 2, 3))))]
        if chance.random() < 0.05:
            exchanges.insert(0 if chance.random() < 0.7 else len(exchanges), chance.choice(GREETINGS))
        turns: list[Turn] = []
        if chance.random() < 0.3:
            turns.append({"role": "system", "content": chance.choice(SYSTEM).format(title=document.title)})
        for question, answer in exchanges:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        made.append(turns)
    return made
