"""A prefix cache in a hostile place: damaged, read-only, deleted, made anew under a reader. The run ends the same."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import test_prefix_cache as runs
import torch

from frostline.data import rows_at
from frostline.engine.prefix_reader import Kept
from frostline.engine.prefix_store import RowStore
from frostline.errors import StorageError

without_plans = runs.without_plans
NOBODY = 65534


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder with a filled cache, and what a run that computes everything ends with."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.ready_module, "plan_of", lambda *_, **__: None)
        computing, _ = runs.trained(folder, "computing", cache="off")
        runs.trained(folder, "keeping")
    return folder, computing


def flip(path: Path, *, every: int = 97) -> None:
    data = bytearray(path.read_bytes())
    data[::every] = bytes(b ^ 0x10 for b in data[::every])
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def each(name: str, do: Callable[[Path], object]) -> Callable[[Path], None]:
    """The same done to a file of every store: of rows that are trained on, and of those that are held out."""

    def damage(cache: Path) -> None:
        found = list(cache.glob(f"*/{name}"))
        assert len(found) == 2
        for path in found:
            do(path)

    return damage


DAMAGE: dict[str, Callable[[Path], None]] = {
    "rows flipped": each("rows.bin", flip),
    "rows cut short": each("rows.bin", cut),
    "rows zeroed": each("rows.bin", lambda p: p.write_bytes(bytes(p.stat().st_size))),
    "rows too long": each("rows.bin", lambda p: p.write_bytes(p.read_bytes() + b"more")),
    "no rows": each("rows.bin", Path.unlink),
    "entries flipped": each("entries.bin", lambda p: flip(p, every=5)),
    "entries cut short": each("entries.bin", cut),
    "key flipped": each("key.json", flip),
    "no key": each("key.json", Path.unlink),
    "no lock": each("lock", Path.unlink),
    "all deleted": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_whatever_was_damaged_between_two_runs_the_second_ends_with_the_same_bytes(
    kept: tuple[Path, dict[str, bytes]], tmp_path: Path, damage: str
) -> None:
    folder, computing = kept
    shutil.copytree(folder / "cache", tmp_path / "cache")
    DAMAGE[damage](tmp_path / "cache")
    reading, said = runs.trained(tmp_path, "reading")
    assert reading == computing
    told = any(w in s for s in said for w in ("was damaged", "were damaged", " 0 of 19 rows"))
    assert told == (damage not in ("no lock", "entries flipped"))
    again, said = runs.trained(tmp_path, "again")
    assert again == computing
    assert "19 of 19 rows are there and" in said[0]
    assert len(said) == 1


@pytest.fixture
def unprivileged() -> Iterator[Callable[..., Path]]:
    """Makes a folder's files belong to a user for whom permissions hold (root is none), who goes on with the test."""
    root = os.geteuid() == 0
    with TemporaryDirectory() as name:

        def give(*, folders: int, files: int) -> None:
            for path in (Path(name), *Path(name).rglob("*")):
                if root:
                    os.chown(path, NOBODY, NOBODY)
                if path.is_relative_to(Path(name) / "cache"):
                    path.chmod(folders if path.is_dir() else files)
            if root:
                os.seteuid(NOBODY)

        give.folder = Path(name)  # type: ignore[attr-defined]
        try:
            yield give  # type: ignore[misc]
        finally:
            if root:
                os.seteuid(0)
            for path in (p for p in Path(name).rglob("*") if p.is_dir()):
                path.chmod(0o700)


def state(cache: Path) -> dict[str, bytes]:
    return {p.relative_to(cache).as_posix(): p.read_bytes() for p in sorted(cache.rglob("*")) if p.is_file()}


def test_a_cache_in_a_read_only_folder_is_read_and_said_to_be_only_read(unprivileged) -> None:
    folder = unprivileged.folder
    computing, _ = runs.trained(folder, "computing", cache="off")
    runs.trained(folder, "keeping")
    before = state(folder / "cache")
    unprivileged(folders=0o555, files=0o444)
    reading, said = runs.trained(folder, "reading")
    assert reading == computing
    assert " 19 of 19 rows are there" in said[0]
    assert said[0].endswith("; nothing can be written there, so it is only read")
    assert state(folder / "cache") == before


@pytest.mark.parametrize("there", ["nothing", "a damaged one", "another one"])
def test_where_nothing_can_be_written_and_nothing_be_read_the_run_computes_and_says_why(unprivileged, there) -> None:
    folder = unprivileged.folder
    computing, _ = runs.trained(folder, "computing", cache="off")
    (folder / "cache").mkdir()
    if there != "nothing":
        runs.trained(folder, "keeping", **({"stage": {"accumulate": 2}} if there == "another one" else {}))
    if there == "a damaged one":
        DAMAGE["rows cut short"](folder / "cache")
    before = state(folder / "cache")
    unprivileged(folders=0o555, files=0o444)
    reading, said = runs.trained(folder, "reading")
    assert reading == computing
    (line,) = said
    assert line.startswith("off: ")
    why = "is read-only here, and what is in it cannot be used" if there == "a damaged one" else "Permission denied"
    assert why in line
    assert state(folder / "cache") == before


def test_a_store_made_anew_leaves_a_process_that_reads_what_it_has_looked_at(tmp_path: Path) -> None:
    """The other process computes something else: what it writes is not what this one has found to be true."""
    like = torch.zeros(3)
    first = RowStore(tmp_path / "store", {}, n_rows=4, like=like)
    first.write([0, 1], [5, 6], torch.ones(2, 3))
    first.commit()
    reader = RowStore(tmp_path / "store", {}, n_rows=4, like=like)
    assert reader.has([0], [5])
    first.clear()
    assert not first.has([0], [5])
    first.write([0, 1, 2], [5, 6, 7], torch.full((3, 3), 2.0))
    first.commit()
    assert reader.has([0, 1], [5, 6])
    assert not reader.has([2], [7])
    assert reader.read([0, 1]).tolist() == [[1, 1, 1], [1, 1, 1]]
    first.close()
    reader.close()
    later = RowStore(tmp_path / "store", {}, n_rows=4, like=like)
    assert later.has([0, 1, 2], [5, 6, 7])
    assert later.read([2]).tolist() == [[2, 2, 2]]
    later.close()


def test_a_store_that_cannot_be_made_anew_ends_the_cache_and_not_the_run(
    kept: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, computing = kept
    shutil.copytree(folder / "cache", tmp_path / "cache")
    for store in (tmp_path / "cache").iterdir():
        rewrite(store)
    honest = RowStore._make

    def full(self: RowStore) -> None:
        (self.folder / "key.json").unlink()
        raise StorageError("No space left on device")

    monkeypatch.setattr(RowStore, "_make", full)
    reading, said = runs.trained(tmp_path, "reading")
    assert reading == computing
    assert "not what is computed here now" in said[1]
    assert said[2:] == ["off: No space left on device"]
    monkeypatch.setattr(RowStore, "_make", honest)
    again, _ = runs.trained(tmp_path, "again")
    assert again == computing


def order(n_steps: int) -> list[Sequence[int]]:
    """The rows of each step."""
    return [rows_at(step, seed=0, n_rows=19, batch=4) for step in range(n_steps)]


def test_rows_that_are_not_true_are_found_out_behind_damaged_ones(
    kept: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """The rows of the first step cannot be held against what is computed."""
    folder, computing = kept
    shutil.copytree(folder / "cache", tmp_path / "cache")
    store = runs.store_of(tmp_path)
    rewrite(store)
    data = bytearray((store / "rows.bin").read_bytes())
    for row in order(1)[0]:
        data[row * len(data) // 19] ^= 1
    (store / "rows.bin").write_bytes(data)
    reading, said = runs.trained(tmp_path, "reading")
    assert reading == computing
    assert any("not what is computed here now" in s for s in said)


def test_a_row_that_is_not_true_among_rows_that_were_missing_is_never_read(
    kept: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """In the first epoch its batch is computed, because the others of it are missing; in the second, the batches before
    its own hold rows of this run alone."""
    folder, computing = kept
    shutil.copytree(folder / "cache", tmp_path / "cache")
    second = order(9)[5:]
    row = next(r for r in second[-1] if all(r not in before for before in second[:-1]))
    rewrite(runs.store_of(tmp_path), only=row)
    reading, said = runs.trained(tmp_path, "reading")
    assert " 1 of 19 rows are there" in said[0]
    assert reading == computing
    assert said[1:] == ["on: rows that were damaged are computed again"]


def test_what_another_process_keeps_meanwhile_is_looked_at_before_it_is_read(
    kept: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began first, computes something else, and has kept nothing yet when this run opens its store."""
    folder, computing = kept
    shutil.copytree(folder / "cache", tmp_path / "cache")
    other, old, tokens = opened(runs.store_of(tmp_path))
    other.clear()
    honest = Kept.__init__

    def init(self: Kept, split: Any, shelf: Any, *args: Any, **more: Any) -> None:
        honest(self, split, shelf, *args, **more)
        if shelf.store.folder == other.folder:
            other.write(range(19), tokens, old + 1e-3)
            other.commit()

    monkeypatch.setattr(Kept, "__init__", init)
    reading, said = runs.trained(tmp_path, "reading")
    other.close()
    assert "another process fills it, so this one only reads" in said[0]
    assert "not what is computed here now" in said[1]
    assert reading == computing


def opened(folder: Path) -> tuple[RowStore, torch.Tensor, list[int]]:
    """A whole store, its rows, and the hashes of their tokens."""
    key = json.loads((folder / "key.json").read_text())
    n_rows, shape = key.pop("rows"), key.pop("shape")
    key.pop("dtype")
    store = RowStore(folder, key, n_rows=n_rows, like=torch.zeros(shape))
    assert not store.was_damaged
    return store, store.read(range(n_rows)), [int(e["tokens"]) for e in store._entries]


def rewrite(folder: Path, *, only: int | None = None) -> None:
    """Other activations for the same rows (or for one, and none for the others), whole and with the right checksums."""
    store, old, tokens = opened(folder)
    store.clear()
    rows = range(store.n_rows) if only is None else [only]
    store.write(rows, [tokens[r] for r in rows], old[list(rows)] + 1e-3)
    store.close()
