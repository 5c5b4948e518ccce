"""Every error a user can meet, each with the exit code of the command line.

Exit codes: 0 done · 1 audit or claim failed, or a run that had started · 2 user's mistake, nothing started · 3 stopped
by non-finite numbers · 4 storage · 75 interrupted and saved, run again · 130 interrupted twice.
Read `FrostlineError` first; `did_you_mean` is the one place that offers near names; `first_line` and `in_one_line` say
what other libraries' errors say.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class FrostlineError(Exception):
    """Base of all errors meant for a person: the message says what was found, where, and what to do."""

    exit_code = 2

    def in_a_run(self) -> None:
        """It ended a run that had started: then it is no longer a mistake by which nothing was started."""
        if self.exit_code == FrostlineError.exit_code:
            self.exit_code = 1


class RecipeError(FrostlineError):
    """The recipe cannot be read, or says something that has no meaning."""


class ModelError(FrostlineError):
    """A model or its tokenizer cannot be found, loaded or built."""


class AnatomyError(FrostlineError):
    """A model has tensors that Frostline does not understand; it never guesses, so it refuses."""


class DataError(FrostlineError):
    """Training or held-out data cannot be read, or is too little."""


class RunFolderError(FrostlineError):
    """A folder is not a run folder, is incomplete, or would be overwritten."""


class SelectionError(FrostlineError):
    """A selection does not parse, matches nothing, or splits tied weights; `column` is 0-based."""

    def __init__(self, message: str, *, expression: str, column: int) -> None:
        self.problem, self.expression, self.column = message, expression, column
        one_line = "".join(" " if c.isspace() else c for c in expression)
        super().__init__(f"{message}\n  {one_line}\n  {' ' * column}^")


class RouteError(FrostlineError):
    """A gradient route that a model does not have, or that its probes do not confirm."""


class NonFiniteError(FrostlineError):
    """The loss or a gradient stopped being finite, or spiked; the weights are those before the update."""

    exit_code = 3

    def __init__(self, message: str, *, loss: float = math.nan, gradient_norm: float = math.nan) -> None:
        self.loss, self.gradient_norm = loss, gradient_norm
        super().__init__(message)


class SpikeError(NonFiniteError):
    """The loss is finite, and far above those before it."""


class CompileError(FrostlineError):
    """`torch.compile` cannot compile a model here, or computes something else than the model does."""


class PlanError(FrostlineError):
    """A cost that cannot be predicted; never a silent zero."""


class StorageError(FrostlineError):
    """Writing to the run folder failed (disk full, read-only, …)."""

    exit_code = 4


def did_you_mean(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """`" Did you mean 'ffn'?"` for the known names nearest to `name`; empty when none is near."""
    small: dict[str, str] = {}
    for each in known:
        small.setdefault(each.casefold(), each)
    near = [small[n] for n in difflib.get_close_matches(name.casefold(), small, n=limit, cutoff=0.5)]
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type's name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def in_one_line(error: BaseException) -> str:
    """`ValueError: …`: an error's type, and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
