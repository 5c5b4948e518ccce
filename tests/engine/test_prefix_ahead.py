"""Rows that one thread reads ahead and writes behind: the same bytes, in the same order, with and without it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import test_prefix_cache as runs
import torch

from frostline.engine import prefix_ahead, prefix_store
from frostline.engine.prefix_ahead import DEPTH, AheadStore
from frostline.engine.prefix_cache import PrefixCache
from frostline.engine.prefix_store import RowStore
from frostline.errors import StorageError

without_plans = runs.without_plans
CPU = torch.device("cpu")


class AtOnce:
    """Stands for the thread: everything is done when it is asked for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def submit(self, run: Callable[..., Any], *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(run(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    def shutdown(self, **_: Any) -> None: ...


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[AheadStore]:
    found = AheadStore(RowStore(tmp_path / "store", {}, n_rows=8, like=torch.zeros(3)), CPU)
    yield found
    found.close()


def held_up(shelf: AheadStore) -> threading.Event:
    """The thread waits for what is returned."""
    go_on = threading.Event()
    shelf._thread.submit(go_on.wait)
    return go_on


def test_with_and_without_a_thread_runs_and_stores_are_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threaded, _ = runs.trained(tmp_path, "threaded", stage={"accumulate": 2})
    stores = {p.name: (p / "rows.bin").read_bytes() for p in (tmp_path / "cache").iterdir()}
    for store in (tmp_path / "cache").iterdir():
        (store / "key.json").unlink()
    monkeypatch.setattr(prefix_ahead, "ThreadPoolExecutor", AtOnce)
    at_once, said = runs.trained(tmp_path, "at once", stage={"accumulate": 2})
    assert " 0 of 19 rows" in said[0]
    assert at_once == threaded
    assert {p.name: (p / "rows.bin").read_bytes() for p in (tmp_path / "cache").iterdir()} == stores


def test_rows_that_were_handed_over_count_before_they_are_written(shelf: AheadStore) -> None:
    go_on = held_up(shelf)
    shelf.write([1, 2], [5, 6], torch.ones(2, 3))
    assert shelf.has([2, 1], [6, 5])
    assert not shelf.has([2], [7])
    assert shelf.store.n_filled == 0
    go_on.set()
    found = shelf.read([2, 1], [6, 5])
    assert found is not None
    assert torch.equal(found, torch.ones(2, 3))


def test_what_was_read_ahead_is_not_read_again(shelf: AheadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.write([1, 2], [5, 6], torch.ones(2, 3))
    shelf.read_ahead([1, 2])
    shelf._thread.submit(bool).result()
    monkeypatch.setattr(RowStore, "read", lambda *_, **__: pytest.fail("it was read again"))
    assert shelf.read([1, 2], [5, 6]) is not None


def test_other_rows_than_those_read_ahead_are_read_themselves(shelf: AheadStore) -> None:
    shelf.write([1, 2], [5, 6], torch.tensor([[1.0, 1, 1], [2, 2, 2]]))
    shelf.read_ahead([1])
    found = shelf.read([2], [6])
    assert found is not None
    assert found.tolist() == [[2, 2, 2]]


def test_rows_of_other_tokens_are_none_even_when_they_were_read_ahead(shelf: AheadStore) -> None:
    shelf.write([1], [5], torch.ones(1, 3))
    shelf.read_ahead([1])
    assert shelf.read([1], [9]) is None
    assert shelf.read([3], [5]) is None


def test_a_damaged_row_is_none_and_told_once(tmp_path: Path, shelf: AheadStore) -> None:
    shelf.write([1], [5], torch.ones(1, 3))
    shelf.close()
    with (tmp_path / "store" / "rows.bin").open("r+b") as file:
        file.seek(12)
        file.write(b"x")
    again = AheadStore(RowStore(tmp_path / "store", {}, n_rows=8, like=torch.zeros(3)), CPU)
    assert again.has([1], [5])
    assert again.read([1], [5]) is None
    assert (again.damaged(), again.damaged()) == (True, False)
    again.close()


def test_no_more_than_a_few_batches_wait(shelf: AheadStore) -> None:
    """One more makes its caller wait until the first is written."""
    go_on, waiting = held_up(shelf), 0

    def release(*args: Any) -> Any:
        nonlocal waiting
        waiting = max(waiting, len(shelf._writing))  # the next one may be done by then, and is let go as well
        go_on.set()
        return honest(*args)

    honest, shelf._finish_one = shelf._finish_one, release  # type: ignore[method-assign]
    for row in range(DEPTH + 1):
        assert not go_on.is_set()
        shelf.write([row], [row], torch.ones(1, 3))
    assert waiting == DEPTH


def test_an_error_of_the_thread_is_raised_where_the_next_row_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    shelf = AheadStore(RowStore(tmp_path / "store", {}, n_rows=8, like=torch.zeros(3)), CPU)
    monkeypatch.setattr(RowStore, "_write_at", staticmethod(full))
    shelf.write([1], [5], torch.ones(1, 3))
    shelf._thread.submit(bool).result()
    assert shelf.read([1], [5]) is None
    with pytest.raises(StorageError, match="No space left"):
        shelf.write([2], [6], torch.ones(1, 3))
    shelf.close()


def test_closing_raises_what_was_not_raised_and_ends_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = AheadStore(RowStore(tmp_path / "store", {}, n_rows=8, like=torch.zeros(3)), CPU)
    monkeypatch.setattr(prefix_store, "zlib", None)  # a fault that is no storage error
    shelf.write([1], [5], torch.ones(1, 3))
    with pytest.raises(AttributeError):
        shelf.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("frostline-prefix")]
    assert shelf.store._data == -1


def test_a_run_leaves_no_thread_behind(tmp_path: Path) -> None:
    runs.trained(tmp_path, "run")
    assert not [t for t in threading.enumerate() if t.name.startswith("frostline-prefix")]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_rows_read_ahead_are_those_of_the_next_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    expected, asked = [], []

    def read_ahead(_shelf: AheadStore, rows: Any) -> None:
        expected.append(tuple(rows))

    def loss(_reader: Any, model: Any, batch: Any, plain: Any) -> Any:
        asked.append(batch.indices)
        return plain(model, batch)

    monkeypatch.setattr(AheadStore, "read_ahead", read_ahead)
    monkeypatch.setattr("frostline.engine.prefix_reader.Reader.loss", loss)
    runs.trained(tmp_path, "run", stage={"accumulate": accumulate})
    assert len(asked) > 10
    assert expected[:-1] == asked[1:]


def test_where_the_order_is_not_known_nothing_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computing, _ = runs.trained(tmp_path, "computing", cache="off")
    monkeypatch.setattr(PrefixCache, "following", lambda *_: ())
    keeping, _ = runs.trained(tmp_path, "keeping")
    assert keeping == computing
