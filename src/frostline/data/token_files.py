"""Examples tokenised once, by several processes, into files that are mapped: no more of them is in memory than is used.

A cache folder holds one folder per content: its name is a hash of the source files, the tokenizer, everything that
decides how text becomes tokens, and this package's own code, so that it is never stale. Parts are written one by one
and renamed when whole; a kill loses the parts in progress. When all are there they are joined into flat files with a
manifest of their SHA-256, and the folder is renamed: what is visible is whole. Read `tokenised` first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from frostline.data.part_files import FILES, append_all, part_name, readable, write_part
from frostline.data.parts import Chunk, chunks_of, made
from frostline.data.sources import FileTally, Tally
from frostline.data.store import Store
from frostline.environment import PACKAGES, hash_file, package_version
from frostline.errors import DataError
from frostline.recipe import DataSpec, SourceSpec, plain, source_of
from frostline.storage import storage_errors, sync

MANIFEST = "MANIFEST.json"
NOT_FOR_TOKENS = ("train", "held_out", "length", "batch", "layout", "long", "apart", "cache", "workers")
"""Keys of `data` that do not change which tokens there are."""

Paths = Iterable[str | Path | SourceSpec]
Say = Callable[[str], None]


def tokenised(
    spec: DataSpec,
    paths: Paths,
    tokenizer: Any,
    *,
    n_vocabulary: int,
    cache: Path,
    workers: int,
    tally: Tally,
    say: Say = lambda _: None,
) -> Store:
    """The examples of `paths` from `cache`, tokenised first where they are not there yet. `tally` is filled.

    Raises `DataError` for what cannot be read and `StorageError` where nothing can be written.
    """
    sources = [source_of(s if isinstance(s, SourceSpec) else str(s)) for s in paths]
    name = content_hash(spec, sources, tokenizer, n_vocabulary=n_vocabulary)
    folder = cache / name
    with storage_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    with _alone(cache / f"{name}.lock"):
        if not _is_whole(folder, say):
            partial = cache / f"{name}.partial"
            with storage_errors(partial):
                partial.mkdir(exist_ok=True)
            found = Tally()
            _write_parts(partial, spec, sources, tokenizer, n_vocabulary, workers=workers, tally=found, say=say)
            _join(partial, folder, found)
    return _opened(folder, tally)


def content_hash(spec: DataSpec, sources: Iterable[SourceSpec], tokenizer: Any, *, n_vocabulary: int) -> str:
    """What the tokens depend on, as 32 hexadecimal digits. Raises `DataError` for a source that is no local file."""
    settings = {k: plain(v) for k, v in spec.model_dump().items() if k not in NOT_FOR_TOKENS}
    if spec.chat_template is not None:
        settings["chat_template"] = hash_file(Path(spec.chat_template))
    sources = list(sources)
    content = {
        "settings": settings,
        "sources": [plain(s.model_dump()) for s in sources],
        "files": [(str(f), hash_file(f)) for s in sources for f in local_files(s)],
        "tokenizer": _tokenizer_text(tokenizer),
        "n_vocabulary": n_vocabulary,
        "code": [hash_file(f) for f in sorted(Path(__file__).parent.glob("*.py"))],
        "packages": {name: package_version(name) for name in PACKAGES},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def local_files(source: SourceSpec) -> list[Path]:
    """The files of a source. Raises `DataError` when it is none on this machine."""
    path = Path(source.path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(
            f"{source.path} is no file or folder here, so its tokens cannot be kept: leave `data.cache` out"
        )
    return sorted(f for f in path.rglob("*") if f.is_file())


def _tokenizer_text(tokenizer: Any) -> list[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, str(getattr(tokenizer, "chat_template", None))]
    return [
        type(tokenizer).__name__,
        content,
        json.dumps(special),
        repr(sorted(tokenizer.init_kwargs.items(), key=str)),
    ]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Inside, no other process makes the same files; waits for one that does."""
    with storage_errors(path):
        file = path.open("a")
    with file:
        try:
            import fcntl
        except ImportError:  # not on Windows
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- parts ----------------------------------------------------------------------------------------------------------


def _write_parts(
    folder: Path,
    spec: DataSpec,
    sources: list[SourceSpec],
    tokenizer: Any,
    n_vocabulary: int,
    *,
    workers: int,
    tally: Tally,
    say: Say,
) -> None:
    """Every part that is not there yet. Raises what the first part that cannot be made raises."""

    def missing() -> Iterator[Chunk]:
        n_kept = 0
        for chunk in chunks_of(spec, sources, tally):
            if readable(folder / part_name(chunk.index)):
                n_kept += 1
                continue
            if n_kept:
                say(f"tokens: {n_kept} parts are there from before")
                n_kept = 0
            yield chunk

    done = 0
    for chunk_index, block, notes in made(missing(), spec, tokenizer, n_vocabulary, workers=workers):
        write_part(folder / part_name(chunk_index), block, notes)
        reached("part")
        done += len(block.tokens)
        if chunk_index % 50 == 49:
            say(f"tokens: {done / 1e6:,.0f} million so far")


# --- joining --------------------------------------------------------------------------------------------------------


def _join(partial: Path, folder: Path, tally: Tally) -> None:
    """All parts in their order as flat files in a folder that appears whole."""
    temporary = folder.with_name(f"{folder.name}.joining")
    parts = sorted(partial.glob("part-*.safetensors"))
    with storage_errors(temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        sources, files = append_all(temporary, parts, tally)
        manifest = {"schema": 1, "sources": sources, "tally": [asdict(t) for t in tally.files.values()], "files": files}
        reached("before manifest")
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*_flat(temporary), temporary / MANIFEST, temporary):
            sync(path)
        reached("before rename")
        temporary.rename(folder)
        sync(folder.parent)
        reached("after rename")
        shutil.rmtree(partial, ignore_errors=True)


# --- opening --------------------------------------------------------------------------------------------------------


def _is_whole(folder: Path, say: Say) -> bool:
    """Whether every file is what was written; what is not is taken away and made again."""
    if not folder.is_dir():
        return False
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != expected["bytes"] or hash_file(path) != expected["sha256"]:
                raise ValueError(f"{name} is not what was written")
        return True
    except (OSError, ValueError, LookupError, TypeError) as error:
        say(f"tokens: {folder.name} in the cache is damaged ({error}) and is made again")
        with storage_errors(folder):
            shutil.rmtree(folder)
        return False


def _opened(folder: Path, tally: Tally) -> Store:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for row in manifest["tally"]:
        tally.files[row["path"]] = FileTally(**{**row, "also": tuple(row["also"])})
    arrays = {n: _mapped(folder / f"{n}.bin", dtype) for n, dtype in FILES.items() if f"{n}.bin" in manifest["files"]}
    return Store(
        tokens=arrays["tokens"],
        learns=arrays.get("learns"),
        offsets=arrays["offsets"],
        n_bytes=arrays["n_bytes"],
        sources=arrays["sources"],
        files=tuple(manifest["sources"]),
    )


def _mapped(path: Path, dtype: torch.dtype) -> torch.Tensor:
    """A file as a tensor that is read when it is looked at."""
    n = path.stat().st_size // dtype.itemsize
    if not n:
        return torch.empty(0, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=n, dtype=dtype)


def _flat(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.bin"))


def reached(point: str) -> None:
    """A moment inside a write; tests replace this function to stop there."""
