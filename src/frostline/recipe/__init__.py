"""Recipes: the YAML file and the typed record it becomes. Read `recipe.py`, then `load.py`."""

from frostline.recipe.comparison import Comparison, Strategy, load_comparison, shipped_comparisons
from frostline.recipe.data_spec import (
    DataSpec,
    FormatName,
    SourceSpec,
    data_sources,
    source_names,
    source_of,
)
from frostline.recipe.load import as_recipe, load_recipe, recipe_from_dict, with_stages
from frostline.recipe.model_spec import ScratchModel, TrainedTokenizer
from frostline.recipe.moe_spec import MoeSpec
from frostline.recipe.recipe import (
    CacheSpec,
    CheckpointSpec,
    EvalSpec,
    EvidenceSpec,
    NonFiniteSpec,
    Recipe,
    RunRateSpec,
    SpikeSpec,
    keys_of,
    plain,
    stage_name,
)
from frostline.recipe.route_spec import RouteSpec
from frostline.recipe.schedule_spec import DurationSpec, NamedSchedule
from frostline.recipe.shipped import is_recipe, shipped_recipes
from frostline.recipe.stage_spec import OptimizerSpec, PlateauSpec, StageSpec
from frostline.recipe.yaml_text import dump_yaml

__all__ = [
    "CacheSpec",
    "CheckpointSpec",
    "Comparison",
    "DataSpec",
    "DurationSpec",
    "EvalSpec",
    "EvidenceSpec",
    "FormatName",
    "MoeSpec",
    "NamedSchedule",
    "NonFiniteSpec",
    "OptimizerSpec",
    "PlateauSpec",
    "Recipe",
    "RouteSpec",
    "RunRateSpec",
    "ScratchModel",
    "SourceSpec",
    "SpikeSpec",
    "StageSpec",
    "Strategy",
    "TrainedTokenizer",
    "as_recipe",
    "data_sources",
    "dump_yaml",
    "is_recipe",
    "keys_of",
    "load_comparison",
    "load_recipe",
    "plain",
    "recipe_from_dict",
    "shipped_comparisons",
    "shipped_recipes",
    "source_names",
    "source_of",
    "stage_name",
    "with_stages",
]
