"""A tokenizer, chat template included, as the files that it is saved as, to be carried inside another file.

Loading executes nothing, and what is loaded is saved anew: no file of a stranger lands anywhere by its own name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from frostline.errors import ModelError
from frostline.model import load_tokenizer
from frostline.model_source import quiet_transformers


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Name → content of every file that the tokenizer is saved as."""
    with TemporaryDirectory() as folder, quiet_transformers():
        tokenizer.save_pretrained(folder)
        root = Path(folder)
        return {f.relative_to(root).as_posix(): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}


def tokenizer_from_files(files: Mapping[str, bytes], *, config: Any, trust_remote_code: bool = False) -> Any:
    """The tokenizer that was saved as these files, for a model of this `config`. Raises `ModelError` for files that
    make none."""
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        for name, content in files.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or name == "config.json":
                raise ModelError(f"a file of a tokenizer cannot be named {name!r}")
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_bytes(content)
        return load_tokenizer(folder, trust_remote_code=trust_remote_code)
