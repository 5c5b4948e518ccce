"""Modules that are installed and do not load, such as builds for another torch: `hide_what_does_not_load`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


def hide_what_does_not_load(name: str, *, stand_in: bool = False) -> None:
    """As if `name` were not installed, for peers to whom it is optional; or (`stand_in`) an empty module, for a peer
    that imports it always and has no use for it here. To be called before transformers is imported."""
    if importlib.util.find_spec(name) is None:
        return
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError, OSError):
        for loaded in [x for x in sys.modules if x.split(".")[0] == name]:
            del sys.modules[loaded]
        empty = ModuleType(name)
        empty.__spec__ = ModuleSpec(name, None)
        sys.modules[name] = empty if stand_in else None  # type: ignore[assignment]
