"""Frostline: train decoder-only language models while deciding exactly what learns and when, and prove it.

The main path is `train`; `learning` does the same in a loop of one's own; `anatomy_of` and `select` say what can learn,
`audit` says what did. Every command of the command line is a call of this module: docs/python.md has the table.
"""

from frostline.anatomy import Anatomy, Component, Slice, anatomy_of_parts, prove, read_anatomy
from frostline.audit import Audit, Diff, audit, diff_checkpoints
from frostline.deltas import apply_deltas, export_delta
from frostline.errors import FrostlineError
from frostline.experiment.claims import measure_claims
from frostline.experiment.compare import compare
from frostline.experiment.demo import claims_of, run_demo
from frostline.experiment.report import write_report
from frostline.experts import experts_of_run, experts_on
from frostline.export import export_run
from frostline.generate import generate_text
from frostline.learning import Learning, learning
from frostline.lr_range import range_test
from frostline.moe import upcycle
from frostline.named_model import anatomy_of
from frostline.planning import Asked, Planned, plan_model, plan_recipe
from frostline.progress import Progress
from frostline.recipe import Recipe, load_recipe, recipe_from_dict, shipped_recipes
from frostline.resume import resume
from frostline.run import RunResult, train
from frostline.scheduling import schedule_recipe
from frostline.selection import Selection, select
from frostline.survey import survey
from frostline.why import why_recipe

__all__ = [
    "Anatomy",
    "Asked",
    "Audit",
    "Component",
    "Diff",
    "FrostlineError",
    "Learning",
    "Planned",
    "Progress",
    "Recipe",
    "RunResult",
    "Selection",
    "Slice",
    "anatomy_of",
    "anatomy_of_parts",
    "apply_deltas",
    "audit",
    "claims_of",
    "compare",
    "diff_checkpoints",
    "experts_of_run",
    "experts_on",
    "export_delta",
    "export_run",
    "generate_text",
    "learning",
    "load_recipe",
    "measure_claims",
    "plan_model",
    "plan_recipe",
    "prove",
    "range_test",
    "read_anatomy",
    "recipe_from_dict",
    "resume",
    "run_demo",
    "schedule_recipe",
    "select",
    "shipped_recipes",
    "survey",
    "train",
    "upcycle",
    "why_recipe",
    "write_report",
]
