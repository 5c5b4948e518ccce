"""What a run ran on: versions, threads, dtype flags, hashes of its data and base, the command."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from frostline.secrecy import command_without_secrets

PACKAGES = ("frostline", "torch", "transformers", "tokenizers", "safetensors", "numpy")
MATTERS = (
    "packages",
    "python",
    "platform",
    "device",
    "device_name",
    "threads",
    "float32_matmul_precision",
    "deterministic_algorithms",
    "cuda_matmul_allow_tf32",
)
"""What of it may change the bits that the same operations give; data and base apart."""


def describe_environment(*, device: torch.device, data: Iterable[str | Path], base: str | None) -> dict[str, Any]:
    """Everything beside the recipe that may change a run's numbers. `base` is the model's folder, if it is one."""
    return {
        "command": command_without_secrets(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES} | {"frostline": own_version()},
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cuda_matmul_allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "data": [{"path": str(f), "sha256": hash_file(f)} for f in _files(data)],
        "base": [{"path": str(f), "sha256": hash_file(f)} for f in _base_files(base)],
    }


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache
def own_version() -> str:
    """Frostline's version, and a hash of its code: between two releases the version says nothing of what changed."""
    return f"{package_version('frostline')}+{hash_code(Path(__file__).parent)[:12]}"


def hash_code(folder: Path) -> str:
    """SHA-256 (hex) over the names and contents of a folder's Python files."""
    files = sorted(folder.rglob("*.py"))
    lines = [f"{f.relative_to(folder).as_posix()} {hash_file(f)}\n" for f in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def package_version(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _files(paths: Iterable[str | Path]) -> list[Path]:
    found = []
    for path in map(Path, paths):
        found += [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    return found


def _base_files(base: str | None) -> list[Path]:
    folder = Path(base) if base else None
    if folder is None or not folder.is_dir():
        return []
    return sorted(f for kind in ("safetensors", "json", "py", "jinja") for f in folder.glob(f"*.{kind}"))
