"""Download documentation as Debian packages and write it as plain text: train.txt, heldout.txt, chat.jsonl.

Documents are separated by a form feed. Nothing is installed: the packages are unpacked into a folder and read there.
"""

import argparse
import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from chat_examples import Document, conversations
from clean_html import Block, blocks_of, paragraphs_of

HERE = Path(__file__).parent
HELD_OUT_IN = 50  # one document in fifty


@dataclass(frozen=True, slots=True)
class Source:
    package: str
    title: str
    licence: str
    pages: str = "**/*.html"
    skip: str = r"$^"


SOURCES = (
    Source("python3.11-doc", "Python", "PSF-2.0"),
    Source("sqlite3-doc", "SQLite", "public domain", "**/sqlite3/**/*.html", "keyword_index|doclist|sitemap|matrix"),
    Source("postgresql-doc-15", "PostgreSQL", "PostgreSQL", skip="bookindex|features-sql|errcodes"),
    Source("python-django-doc", "Django", "BSD-3-Clause", skip="_modules"),
    Source(
        "rust-doc",
        "Rust",
        "MIT OR Apache-2.0",
        skip=r"/html/(core|alloc|src|test|proc_macro|implementors|embedded-book)/|std/(arch|simd|os)/|print\.html|static\.files|licen[sc]e",
    ),
    Source("python-sqlalchemy-doc", "SQLAlchemy", "MIT"),
    Source("nodejs-doc", "Node.js", "MIT", skip="/all.html"),
    Source("llvm-14-doc", "LLVM", "Apache-2.0 WITH LLVM-exception"),
    Source("clang-14-doc", "Clang", "Apache-2.0 WITH LLVM-exception"),
    Source("cmake-doc", "CMake", "BSD-3-Clause"),
    Source("apache2-doc", "Apache HTTP Server", "Apache-2.0", "**/manual/en/**/*.html"),
    Source("erlang-doc", "Erlang", "Apache-2.0", skip="users_guide.html|_chapter.*old|/release_notes"),
    Source("python-scipy-doc", "SciPy", "BSD-3-Clause"),
    Source("python-pandas-doc", "pandas", "BSD-3-Clause", skip="cookbook|_modules"),
    Source("python-sympy-doc", "SymPy", "BSD-3-Clause", skip="_modules"),
    Source("python-dask-doc", "Dask", "BSD-3-Clause", skip="_modules"),
    Source("python-xarray-doc", "xarray", "Apache-2.0", skip="_modules"),
    Source("python-aiohttp-doc", "aiohttp", "Apache-2.0", skip="_modules"),
    Source("python-tornado-doc", "Tornado", "Apache-2.0", skip="_modules"),
    Source("python-pytest-doc", "pytest", "MIT", skip="_modules"),
    Source("python-requests-doc", "Requests", "Apache-2.0", skip="_modules"),
    Source("python-flask-doc", "Flask", "BSD-3-Clause", skip="_modules"),
    Source("python-werkzeug-doc", "Werkzeug", "BSD-3-Clause", skip="_modules"),
    Source("python-jinja2-doc", "Jinja", "BSD-3-Clause", skip="_modules"),
    Source("python-click-doc", "Click", "BSD-3-Clause", skip="_modules"),
    Source("python-attr-doc", "attrs", "MIT", skip="_modules"),
    Source("python-cryptography-doc", "cryptography", "Apache-2.0 OR BSD-3-Clause", skip="_modules"),
)
NEVER = re.compile(r"genindex|py-modindex|search\.html|searchindex|/_static/|redirect|copyright\.html|license|404")


def unpack(source: Source, work: Path) -> Path:
    """Download and unpack one package; nothing to do the second time."""
    root = work / source.package
    if not root.exists():
        subprocess.run(["apt-get", "download", "-qq", source.package], cwd=work, check=True)
        (archive,) = work.glob(f"{source.package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, root], check=True)
    return root


def read_page(path: Path) -> list[Block]:
    return paragraphs_of(blocks_of(path.read_text("utf-8", errors="ignore")))


def documents_of(source: Source, root: Path, pool: ProcessPoolExecutor) -> Iterator[Document]:
    skip = re.compile(source.skip)
    files = [
        path
        for path in sorted(root.glob(source.pages))
        if path.is_file()
        and not path.is_symlink()
        and not skip.search(str(path.relative_to(root.parent)))
        and not NEVER.search(str(path.relative_to(root)))
    ]
    for path, blocks in zip(files, pool.map(read_page, files, chunksize=16), strict=True):
        yield Document(f"{source.package}:{path.relative_to(root)}", source.title, blocks)


def drop_seen(document: Document, seen: set[bytes]) -> Document:
    """Without the paragraphs that another document (or this one) has had, nor the headings left with nothing below."""
    fresh: list[Block] = []
    pending: list[Block] = []
    for block in document.blocks:
        if block.kind[0] == "h" or block.kind == "dt":
            pending.append(block)
            continue
        key = hashlib.blake2b(re.sub(r"\W+", "", block.text.lower()).encode(), digest_size=8).digest()
        if key not in seen:
            seen.add(key)
            fresh += [*pending, block]
        pending = []
    return Document(document.name, document.title, fresh)


def is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") % HELD_OUT_IN == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=HERE / "data" / "packages", help="where packages are unpacked")
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    seen: set[bytes] = set()
    sizes: dict[str, dict[str, int | str]] = {}
    with (
        ProcessPoolExecutor(args.processes) as pool,
        open(args.out / "train.txt", "w") as train,
        open(args.out / "heldout.txt", "w") as heldout,
        open(args.out / "chat.jsonl", "w") as chat,
    ):
        for source in SOURCES:
            num_documents, num_bytes = 0, 0
            for document in documents_of(source, unpack(source, args.work), pool):
                fresh = drop_seen(document, seen)
                text = fresh.text()
                if len(text) < 400:
                    continue
                num_documents, num_bytes = num_documents + 1, num_bytes + len(text.encode())
                if is_held_out(document.name):
                    heldout.write(text + "\n\f")
                    continue
                train.write(text + "\n\f")
                chat.writelines(json.dumps(turns) + "\n" for turns in conversations(fresh))
            sizes[source.package] = {
                "title": source.title,
                "licence": source.licence,
                "documents": num_documents,
                "bytes": num_bytes,
            }
            print(f"{source.package:24} {num_documents:6} documents {num_bytes / 1e6:7.2f} MB", flush=True)
    (HERE / "sources.json").write_text(json.dumps(sizes, indent=1) + "\n")
    for name in ("train.txt", "heldout.txt", "chat.jsonl"):
        print(f"{name:12} {(args.out / name).stat().st_size / 1e6:7.2f} MB")


if __name__ == "__main__":
    main()
