"""The text that every CPython carries: the language documentation and the sources of the standard library."""

from __future__ import annotations

import sysconfig
from hashlib import sha256
from pathlib import Path
from pydoc_data.topics import topics

CORPUS_BYTES = 2_000_000
"""Documentation first, then sources until this many bytes are reached."""


def write_corpus(folder: Path, *, n_bytes: int = CORPUS_BYTES) -> Path:
    """Write the corpus as text files into `folder`, documents in an order that mixes both kinds; returns the folder.

    The text differs between Python versions, patch versions included: the run folder records its hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    documents = {f"topic {name}": text for name, text in topics.items()}
    size = sum(len(t.encode()) for t in documents.values())
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if size + len(text.encode()) > n_bytes:
            continue
        documents[path.name] = text
        size += len(text.encode())
    for i, name in enumerate(sorted(documents, key=lambda n: sha256(n.encode()).digest())):
        (folder / f"{i:04}.txt").write_text(documents[name], encoding="utf-8")
    return folder


def some_text() -> str:
    """Enough of the language documentation for a few rows of tokens."""
    return "\n\n".join(topics[name] for name in sorted(topics))[:60_000]
