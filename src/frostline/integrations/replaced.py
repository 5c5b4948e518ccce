"""Methods of an object that somebody else made, with others in their place for a while. Read `Replaced`."""

from __future__ import annotations

from typing import Any


class Replaced:
    """Attributes of one object with others in their place, until they are put back."""

    def __init__(self, thing: Any) -> None:
        self._thing, self._before = thing, dict[str, Any]()

    def put(self, name: str, value: Any) -> Any:
        """Put a value there; returns what was there."""
        before = getattr(self._thing, name)
        self._before[name] = vars(self._thing).get(name)
        setattr(self._thing, name, value)
        return before

    def back(self) -> None:
        """Put everything back."""
        for name, own_value in self._before.items():
            delattr(self._thing, name)
            if own_value is not None:
                setattr(self._thing, name, own_value)
        self._before = {}
