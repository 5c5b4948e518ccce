"""Recipes: the YAML file and the typed record it becomes. Read `recipe.py`, then `load.py`."""

from frostline.recipe.data_spec import (
    DataSpec,
    FormatName,
    SourceSpec,
    data_paths,
    source_names,
    source_of,
)
from frostline.recipe.load import load_recipe, recipe_from_dict
from frostline.recipe.model_spec import ScratchModel, TrainedTokenizer
from frostline.recipe.moe_spec import MoeSpec
from frostline.recipe.recipe import (
    CheckpointSpec,
    EvalSpec,
    EvidenceSpec,
    NonFiniteSpec,
    Recipe,
    RunRateSpec,
    SpikeSpec,
    plain,
    stage_name,
)
from frostline.recipe.route_spec import RouteSpec
from frostline.recipe.stage_spec import OptimizerSpec, PlateauSpec, StageSpec
from frostline.recipe.yaml_text import dump_yaml

__all__ = [
    "CheckpointSpec",
    "DataSpec",
    "EvalSpec",
    "EvidenceSpec",
    "FormatName",
    "MoeSpec",
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
    "TrainedTokenizer",
    "data_paths",
    "dump_yaml",
    "load_recipe",
    "plain",
    "recipe_from_dict",
    "source_names",
    "source_of",
    "stage_name",
]
