"""When a run's state is saved. Read `Saver`."""

from __future__ import annotations

import time
from collections.abc import Callable

from frostline.checkpoints import Checkpoints
from frostline.engine.run_state import RunState, to_files
from frostline.recipe import Recipe


class Saver:
    """Called after every step; saves when it is due. How often changes nothing about the result of the run."""

    def __init__(self, checkpoints: Checkpoints, recipe: Recipe, *, saved: int = 0) -> None:
        """`saved`: the step whose checkpoint the run goes on from."""
        self.checkpoints, self.spec = checkpoints, recipe.checkpoint
        self._recipe = recipe.as_dict()
        self._saved = saved
        self._when = time.monotonic()

    def __call__(self, done: int, now: bool, state: Callable[[], RunState]) -> None:
        """`now`: a stage has ended, or the run stops here. Raises `StorageError`; older checkpoints stay."""
        if done == self._saved or not (now or self._due(done)):
            return
        tensors, data = to_files(state())
        written = self.checkpoints.write(done, tensors, {**data, "recipe": self._recipe})
        self.checkpoints.prune(self.spec.keep, written=written)
        self._saved, self._when = done, time.monotonic()

    def _due(self, done: int) -> bool:
        by_steps = self.spec.every is not None and done % self.spec.every == 0
        by_time = self.spec.minutes is not None and time.monotonic() - self._when >= 60 * self.spec.minutes
        return by_steps or by_time
