"""HTML documentation to plain paragraphs: no tags, no menus, no tables of contents, short code kept."""

import html
import re
from dataclasses import dataclass

BEGINS = (
    'role="main"',
    'id="main-content"',
    "<main",
    'id="yui-main"',
    'id="docs-body"',
    'id="apicontent"',
    'id="page-content"',
    'id="content"',
    "<body",
)
ENDS = (
    'class="sphinxsidebar"',
    "<footer",
    'class="navfooter"',
    'id="footer"',
    'class="footer"',
    'class="nav-wrapper"',
    'id="comments_section"',
    'class="bottomlang"',
    "</body",
)
INVISIBLE = re.compile(r"<(script|style|svg|nav|aside|button|select|form)\b.*?</\1>|<!--.*?-->", re.S | re.I)
PERMALINK = re.compile(
    r'<a [^>]*class="?(?:headerlink|anchor|mark|srclink|src|reference internal image)\b[^>]*>.*?</a>', re.S
)
INLINE = re.compile(
    r"</?(?:span|a|em|strong|b|i|tt|code|var|kbd|samp|cite|abbr|wbr|sup|sub|font|small|q|dfn|u|img)\b[^>]*>", re.I
)
TOKEN = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)([^>]*)>|([^<]+|<)")
UNWANTED = re.compile(
    r'class="?[^">]*\b(?:toc|toctree-wrapper|related|menu|mainmenu|navheader|fancy_toc|fancy-toc\d|contents|'
    r"directive-wrapper|breadcrumbs|versionmodified|rustdoc-toggle-hidden|out-of-band)\b"
)
ID = re.compile(r'\bid="?([^"\s>]+)')
PLAIN = str.maketrans(
    {
        "\xa0": " ",
        "\u00b6": "",
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u200b": "",
        "\xad": "",
        "\f": " ",
    }
)
CONTAINERS = {"div", "ul", "ol", "dl", "table", "section", "details", "p"}


@dataclass(slots=True)
class Block:
    """One run of text and the element it stood in: p, li, dt, dd, pre, td, h1 to h6."""

    kind: str
    text: str
    anchor: str = ""


def body_of(page: str) -> str:
    """The slice of the page that holds its prose."""
    start = next((at for mark in BEGINS if (at := page.find(mark)) >= 0), 0)
    start = page.find(">", start) + 1
    end = min((at for mark in ENDS if (at := page.find(mark, start)) >= 0), default=len(page))
    return page[start:end]


def blocks_of(page: str) -> list[Block]:
    """Split the page's prose at every block element."""
    page = INLINE.sub("", PERMALINK.sub("", INVISIBLE.sub("", body_of(page))))
    blocks: list[Block] = []
    kinds, text, anchor = ["p"], [""], ""
    skipped: tuple[str, int] | None = None  # the unwanted element that we are in, and how many of its kind are open

    def flush() -> None:
        raw = html.unescape("".join(text)).translate(PLAIN).replace("[source]", "")
        kept = raw.strip("\n").rstrip() if kinds[-1] == "pre" else " ".join(raw.split())
        if kept.strip():
            blocks.append(Block(kinds[-1], kept, anchor))
        text.clear()

    for match in TOKEN.finditer(page):
        closing, name, attributes, words = match.groups()
        if words is not None:
            if skipped is None:
                text.append(words)
            continue
        name = name.lower()
        if skipped is not None:
            if name == skipped[0]:
                depth = skipped[1] + (-1 if closing else 1)
                skipped = (name, depth) if depth else None
        elif not closing and name in CONTAINERS and UNWANTED.search(attributes):
            flush()
            skipped = (name, 1)
        elif name == "br":
            text.append("\n")
        else:
            if kinds[-1] == "pre" and not (closing and name == "pre"):
                continue
            flush()
            if name in {"p", "li", "dt", "dd", "pre", "td", "th", "h1", "h2", "h3", "h4", "h5", "h6"}:
                if not closing:
                    kinds.append(name if not (name == "p" and kinds[-1] in {"li", "dd", "td"}) else kinds[-1])
                    found = ID.search(attributes)
                    anchor = found.group(1) if found else ""
                elif len(kinds) > 1:
                    kinds.pop()
            del kinds[1:-8]  # pages with unclosed <li> and <p>: do not grow without end
    flush()
    return blocks


def is_prose(text: str) -> bool:
    """A sentence or more, rather than a table cell, a list of names or a signature."""
    if len(text) < 40 or text.count(" ") < 6:
        return False
    letters = sum(c.isalpha() or c == " " for c in text)
    return letters > 0.8 * len(text) and (text.isascii() or sum(c > "\u024f" for c in text) < 0.02 * len(text))


def is_short_code(text: str) -> bool:
    return len(text) < 500 and text.count("\n") < 14 and max(map(len, text.split("\n"))) < 100 and text.isascii()


def paragraphs_of(blocks: list[Block]) -> list[Block]:
    """The blocks worth reading: prose, the headings and terms that introduce prose, and code that prose introduces."""
    kept: list[Block] = []
    pending: list[Block] = []  # headings and terms, waiting for prose
    for block in blocks:
        if block.kind.startswith("h") or (block.kind == "dt" and len(block.text) < 200):
            pending = [*[b for b in pending if b.kind != block.kind][-1:], block]
        elif block.kind == "pre":
            if kept and not pending and kept[-1].kind != "pre" and is_short_code(block.text):
                kept.append(block)
        elif is_prose(block.text):
            kept += pending
            pending = []
            kept.append(Block(block.kind, "- " + block.text if block.kind == "li" else block.text, block.anchor))
    return kept
