"""Where a model comes from, and whether it may be loaded: names and commits, code that comes along, what is missing.

Every refusal is a `ModelError` that says what to do. Read `pinned` and `loading` first.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from frostline.errors import ModelError
from frostline.recipe import ScratchModel

Source = str | ScratchModel
"""A folder or hub name, or the configuration of a model built from scratch."""


def place(source: str) -> tuple[str]:
    """The folder or hub name, without the commit after an `@`."""
    return (source if Path(source).exists() else source.partition("@")[0],)


def pinned(source: str, trust_remote_code: bool) -> dict[str, Any]:
    """The commit of a hub name, and whether code that comes with the model may run. Raises `ModelError` for code from
    the hub that may be another tomorrow."""
    commit = "" if Path(source).exists() else source.partition("@")[2]
    if trust_remote_code and not Path(source).exists() and not re.fullmatch("[0-9a-f]{40}", commit):
        raise ModelError(
            f"{source}: code from a hub is run only as it is at a commit that you have looked at; write "
            f"{source.partition('@')[0]}@ and the 40 digits of the commit"
        )
    elsewhere = [name for name in code_of(source).values() if "--" in name]
    if trust_remote_code and elsewhere:
        raise ModelError(f"{source}: its code lies in another repository ({elsewhere[0]}); copy it into the folder")
    pin = {"revision": commit} if commit else {}
    return {"trust_remote_code": trust_remote_code, **pin, **({"code_revision": commit} if commit else {})}


def code_allowed(config: Any, source: Source, trust_remote_code: bool) -> dict[str, Any]:
    """The same for a model that is built from its configuration."""
    if isinstance(source, ScratchModel) or not trust_remote_code:
        return {"trust_remote_code": False}
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    pin = pinned(source, trust_remote_code)
    return {"trust_remote_code": True, **({"code_revision": pin["revision"]} if own and "revision" in pin else {})}


def code_of(source: str) -> dict[str, str]:
    """What code a folder's configuration asks for: class → `file.Class`; none for a hub name."""
    try:
        found = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))["auto_map"]
        return {str(k): str(v[-1] if isinstance(v, list) else v) for k, v in found.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def check_exists(source: str, *, has: tuple[str, ...] = ("config.json",)) -> None:
    """Raise `ModelError` for a path that is no model folder (it has none of the files `has`), and for one that is not
    there."""
    path = Path(source)
    if path.exists():
        if path.is_dir() and not any((path / name).exists() for name in has):
            inside = f"; the model of this run folder is {path / 'model'}" if (path / "schedule.json").exists() else ""
            raise ModelError(f"{source} is no model folder: it has no {' or '.join(has)}{inside}")
        return
    if source.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", source):
        raise ModelError(f"no model at {source}: there is no such folder")


def check_safetensors(source: str) -> None:
    """Raise `ModelError` for a folder without weights, or with weights that only a pickle holds."""
    folder = Path(source)
    if (folder / "model.safetensors.index.json").exists():
        shard_names(folder / "model.safetensors.index.json")
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = [p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))]
        if pickles:
            raise ModelError(
                f"{source} holds its weights as a pickle ({pickles[0]}), which can run any code when it is read; "
                "convert it to safetensors first"
            )
        raise ModelError(f"{source} holds no weights (*.safetensors)")


def check_complete(source: str, info: Mapping[str, Any]) -> None:
    """Raise `ModelError` when transformers, by its loading `info`, has made weights up."""
    missing = sorted(map(str, info.get("missing_keys") or ()))
    if missing:
        raise ModelError(f"{source} lacks {len(missing)} tensors of its architecture: {', '.join(missing[:5])}")
    other = [
        f"{name} ({', '.join(map(str, held))}) where its configuration says ({', '.join(map(str, wanted))})"
        for name, held, wanted in sorted(info.get("mismatched_keys") or ())
    ]
    if other:
        raise ModelError(
            f"{source} has other shapes for {len(other)} tensors of its architecture: {', '.join(other[:3])}"
        )


@contextmanager
def loading(what: str, source: Source) -> Iterator[None]:
    """Inside, transformers is quiet, and whatever its classes and the files make it raise is a `ModelError`."""
    try:
        with quiet_transformers():
            yield
    except Exception as error:
        raise _cannot_load(what, source, error) from error


def _cannot_load(what: str, source: Source, error: Exception) -> ModelError:
    if isinstance(error, ModelError):
        return error
    if "trust_remote_code" in str(error):
        files = sorted({f"{name.rpartition('.')[0]}.py" for name in code_of(str(source)).values()})
        where = f" ({', '.join(files)})" if files else ""
        return ModelError(f"{source} comes with code of its own{where}; only `--trust-remote-code` runs it")
    if isinstance(source, ScratchModel):
        return ModelError(f"model: no '{source.architecture}' can be built with this configuration: {reason(error)}")
    name = source
    hint = "" if Path(source).exists() else " It is not a folder here either."
    return ModelError(f"no {what} can be loaded from '{name}': {reason(error)}.{hint}")


def reason(error: Exception) -> str:
    """What an error says in a line; with its type, where that is not one of those that are meant for people."""
    if isinstance(error, StrictDataclassError) and isinstance(error.__cause__, Exception):
        return reason(error.__cause__)  # the check that failed; the error itself says only which method it was in
    line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    plain = isinstance(error, (OSError, ValueError, RuntimeError)) and line
    return line if plain else f"{type(error).__name__}: {line}".rstrip(": ")


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names, all of them beside it. Raises `ModelError`."""
    try:
        by_name = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = list(dict.fromkeys(by_name.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is no readable index of shards: {reason(error)}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index} names a shard outside its folder: {name}")
    return names


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers inside: what matters is said by Frostline."""
    from transformers.utils import logging as transformers_logging

    hub = logging.getLogger("huggingface_hub")
    level, hub_level = transformers_logging.get_verbosity(), hub.level
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub.setLevel(logging.CRITICAL)  # its retries are over when the error we report is raised
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()
