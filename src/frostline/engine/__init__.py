"""The engine: exact execution of a schedule, and the evidence of it. Read `train.py`, then `owned.py`."""

from frostline.engine.events import Evaluated, Event, Observer, RunStarted, StageEnded, StageStarted, StepDone
from frostline.engine.loss import next_token_loss
from frostline.engine.optimizers import check_installed
from frostline.engine.step import StepRecord, step
from frostline.engine.train import LoopResult, LoopSettings, train_loop

__all__ = [
    "Evaluated",
    "Event",
    "LoopResult",
    "LoopSettings",
    "Observer",
    "RunStarted",
    "StageEnded",
    "StageStarted",
    "StepDone",
    "StepRecord",
    "check_installed",
    "next_token_loss",
    "step",
    "train_loop",
]
