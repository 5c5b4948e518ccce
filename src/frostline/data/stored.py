"""What needs the extra `data`: Parquet, Zstandard, folders written by `datasets`, and datasets of a hub.

Nothing that comes with a dataset is executed: `datasets` reads data files only. Read `saved_rows` first.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, cast

from frostline.errors import DataError, first_line
from frostline.model_source import quiet_transformers

ROWS_TOGETHER = 256


def needed(package: str, *, to: str) -> Any:
    """An optional package, or a `DataError` that says how to get it."""
    try:
        return import_module(package)
    except ImportError:
        raise DataError(f"{to} needs {package.partition('.')[0]}: pip install 'frostline[data]'") from None


def parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, a few hundred in memory. Raises `DataError`."""
    parquet = needed("pyarrow.parquet", to="reading .parquet")
    arrow_error = needed("pyarrow", to="reading .parquet").ArrowException
    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=ROWS_TOGETHER):
                yield from batch.to_pylist()
    except arrow_error as error:
        raise DataError(f"{file}: no readable Parquet file: {first_line(error)}") from None


@contextmanager
def zstd_stream(file: Path) -> Iterator[BinaryIO]:
    """The bytes inside a `.zst` file."""
    arrow = needed("pyarrow", to="reading .zst")
    with arrow.input_stream(str(file), compression="zstd") as stream:
        yield cast(BinaryIO, io.BufferedReader(stream))


def stored_kind(folder: Path) -> str | None:
    """`one` for a saved dataset, `splits` for a saved dictionary of them, None for another folder."""
    if (folder / "dataset_dict.json").is_file():
        return "splits"
    return "one" if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file() else None


def saved_rows(folder: Path, *, split: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a folder that `datasets` saved. Raises `DataError`."""
    datasets = needed("datasets", to="reading a saved dataset")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # it raises whatever the files make it raise
        raise DataError(f"{folder}: the saved dataset cannot be read: {first_line(error)}") from None
    if isinstance(loaded, dict):
        wanted = split or "train"
        if wanted not in loaded:
            raise DataError(f"{folder}: no split '{wanted}'; it has {', '.join(map(repr, loaded))} (`split: NAME`)")
        loaded = loaded[wanted]
    elif split is not None:
        raise DataError(f"{folder}: one saved dataset without splits, so there is no split '{split}'")
    yield from loaded


def hub_rows(name: str, *, split: str | None, subset: str | None, revision: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a dataset of a hub, downloaded and kept by `datasets`. Raises `DataError`."""
    yield from _hub_dataset(name, split, subset, revision)


def hub_files(name: str, *, split: str | None, subset: str | None, revision: str | None) -> list[str]:
    """The files in which `datasets` keeps what it downloaded; their bytes say whether the data are the same."""
    return [f["filename"] for f in _hub_dataset(name, split, subset, revision).cache_files]


def _hub_dataset(name: str, split: str | None, subset: str | None, revision: str | None) -> Any:
    datasets = needed("datasets", to=f"{name} is no file here; loading it from the hub")
    try:
        with quiet_transformers():  # the hub's client tells of every retry
            return datasets.load_dataset(name, subset, split=split or "train", revision=revision)
    except Exception as error:  # it raises whatever the network and the files make it raise
        raise DataError(
            f"no file or folder {name} here, and no dataset of that name can be loaded from the hub: "
            f"{first_line(error)}"
        ) from None
