"""The engine: exact execution of a schedule, and the evidence of it. Read `train.py`, then `owned.py`."""

from frostline.engine.events import (
    Chose,
    Evaluated,
    Event,
    Noted,
    Observer,
    RolledBack,
    RunStarted,
    SetEvaluated,
    StageCompiled,
    StageEnded,
    StageStarted,
    StepDone,
)
from frostline.engine.fused_loss import Chosen, How, choose_loss
from frostline.engine.loop_settings import LoopResult, LoopSettings
from frostline.engine.loss import loss_of, next_token_loss
from frostline.engine.optimizers import check_installed
from frostline.engine.place import place
from frostline.engine.prefix_cache import PrefixCache
from frostline.engine.prefix_reader import PrefixSettings
from frostline.engine.routes import Points, set_routes
from frostline.engine.step import LossFunction, StepRecord, step
from frostline.engine.train import train_loop

__all__ = [
    "Chose",
    "Chosen",
    "Evaluated",
    "Event",
    "How",
    "LoopResult",
    "LoopSettings",
    "LossFunction",
    "Noted",
    "Observer",
    "Points",
    "PrefixCache",
    "PrefixSettings",
    "RolledBack",
    "RunStarted",
    "SetEvaluated",
    "StageCompiled",
    "StageEnded",
    "StageStarted",
    "StepDone",
    "StepRecord",
    "check_installed",
    "choose_loss",
    "loss_of",
    "next_token_loss",
    "place",
    "set_routes",
    "step",
    "train_loop",
]
