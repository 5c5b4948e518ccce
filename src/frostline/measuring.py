"""Which experts a recipe's training data uses, measured with its model as it is loaded, before anything is trained."""

from __future__ import annotations

from torch import nn

from frostline.anatomy import Anatomy, read_anatomy
from frostline.choices import Choice, make_choice, wants_measurement
from frostline.data import Rows
from frostline.errors import ModelError, RecipeError
from frostline.feed import get_tokenizer, make_feed
from frostline.model import load_model, untie
from frostline.moe import Usage, measure_usage
from frostline.recipe import Recipe

TOKENS = 131_072
"""Tokens that a measurement takes: 32 rows of 4,096, as ESFT does."""


def choose(recipe: Recipe, *, trust_remote_code: bool = False) -> Choice | None:
    """What the recipe's selections mean where the model alone does not decide; None where it does.

    Loads the model, for the measurement alone, where a stage ranks experts. Raises a `FrostlineError`.
    """
    if not wants_measurement(recipe):
        return None
    model = load_model(recipe.model, seed=recipe.seed, trust_remote_code=trust_remote_code)
    if recipe.ties == "untie":
        untie(model)
    anatomy = read_anatomy(model)
    rows = make_feed(recipe, get_tokenizer(recipe, trust_remote_code=trust_remote_code)).text
    try:
        usage = measure_rows(model, anatomy, rows, length=recipe.data.length, at_once=recipe.data.batch)
    except ModelError as error:
        raise RecipeError(f"a stage ranks experts by their use: {error}") from None
    return make_choice(recipe, anatomy, usage)


def n_measured(n_rows: int, length: int) -> int:
    """Rows that a measurement takes."""
    return min(n_rows, max(TOKENS // length, 1))


def measure_rows(model: nn.Module, anatomy: Anatomy, rows: Rows, *, length: int, at_once: int) -> Usage:
    """Which experts a model uses on rows spread evenly over the training data, `TOKENS` tokens of it at most."""
    n = n_measured(len(rows), length)
    indices = [i * len(rows) // n for i in range(n)]
    return measure_usage(
        model, anatomy, (rows.batch(indices[at : at + at_once]).input_ids for at in range(0, n, at_once))
    )
