"""When a run's state is saved, and taken back. Read `Saver`."""

from __future__ import annotations

import time
from collections.abc import Callable

from frostline.checkpoints import Checkpoints
from frostline.engine.loop_settings import Moment
from frostline.engine.run_state import RunState, from_files, to_files
from frostline.errors import NonFiniteError, SpikeError
from frostline.recipe import Recipe


class Saver:
    """Called after every step; saves when it is due. How often changes nothing about the result of the run."""

    def __init__(self, checkpoints: Checkpoints, recipe: Recipe, *, saved: int | None = None) -> None:
        """`saved`: the step whose checkpoint the run goes on from."""
        self.checkpoints, self.spec = checkpoints, recipe.checkpoint
        self._spec, self._recipe = recipe, recipe.as_dict()
        self._saved = saved
        self._when = time.monotonic()

    def __call__(self, done: int, moment: Moment, state: Callable[[], RunState]) -> None:
        """Save, if it is due. Raises `StorageError`; older checkpoints stay."""
        if done == self._saved or not self._due(done, moment):
            return
        captured = state()
        tensors, data = to_files(captured)
        written = self.checkpoints.write(done, tensors, {**data, "recipe": self._recipe})
        spared = self.anchor(done, max((0, *captured.endings))) if self._spec.rolls_back else None
        self.checkpoints.prune(self.spec.keep, written=written, spared=spared)
        self._saved, self._when = done, time.monotonic()

    def _due(self, done: int, moment: Moment) -> bool:
        if moment in ("start", "step"):
            by_steps = self.spec.every is not None and done % self.spec.every == 0
            by_time = self.spec.minutes is not None and time.monotonic() - self._when >= 60 * self.spec.minutes
            return self._spec.rolls_back if moment == "start" else by_steps or by_time
        return True

    def anchor(self, done: int, first: int) -> int:
        """The step of the checkpoint to go back to: neither clocks nor stops decide about it, so that a run that was
        killed goes back where the run that was not would have. `first`: the stage's start, or a later step."""
        every = self.spec.every or max(done, 1)
        return max(first, done - done % every)

    def go_back(self, why: NonFiniteError, done: int, first: int, n_before: int) -> RunState:
        """The state to go back to, or `why` raised again. Checkpoints after it are of steps that no longer count."""
        policy = self._spec.spike if isinstance(why, SpikeError) else self._spec.nonfinite
        if policy is None or policy.policy != "rollback":
            raise why
        if n_before >= policy.limit:
            raise type(why)(f"{why}; the run went back {n_before} times before, and may no more (limit {policy.limit})")
        anchor = self.anchor(done, first)
        steps = [anchor, *(s for s in reversed(self.checkpoints.steps()) if first <= s <= done and s != anchor)]
        found = next((c for c in map(self.checkpoints.of, steps) if c is not None), None)
        if found is None:
            raise type(why)(f"{why}; no checkpoint from step {first} to {done} verifies, so the run cannot go back")
        self.checkpoints.drop_after(found.step)
        self._saved, self._when = found.step, time.monotonic()
        return from_files({n: found.tensors(n) for n in ("weights", "optimizer")}, found.data)
