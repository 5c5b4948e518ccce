"""Frostline: train decoder-only language models while deciding exactly what learns and when, and prove it.

The main path is `train`; `learning` does the same in a loop of one's own; `read_anatomy` and `select` say what can
learn, `audit` says what did.
"""

from frostline.anatomy import Anatomy, Component, Slice, anatomy_of_parts, read_anatomy
from frostline.audit import Audit, Diff, audit, diff_checkpoints
from frostline.errors import FrostlineError
from frostline.experiment.compare import compare
from frostline.learning import Learning, learning
from frostline.recipe import Recipe, load_recipe, recipe_from_dict
from frostline.run import RunResult, train
from frostline.selection import Selection, select

__all__ = [
    "Anatomy",
    "Audit",
    "Component",
    "Diff",
    "FrostlineError",
    "Learning",
    "Recipe",
    "RunResult",
    "Selection",
    "Slice",
    "anatomy_of_parts",
    "audit",
    "compare",
    "diff_checkpoints",
    "learning",
    "load_recipe",
    "read_anatomy",
    "recipe_from_dict",
    "select",
    "train",
]
