"""The engine: exact execution of a schedule, and the evidence of it. Read `train.py`, then `owned.py`."""

from frostline.engine.events import Evaluated, Event, Observer, RunStarted, StageEnded, StageStarted, StepDone
from frostline.engine.loss import next_token_loss
from frostline.engine.step import StepRecord, step
from frostline.engine.train import LoopSettings, train_loop

__all__ = [
    "Evaluated",
    "Event",
    "LoopSettings",
    "Observer",
    "RunStarted",
    "StageEnded",
    "StageStarted",
    "StepDone",
    "StepRecord",
    "next_token_loss",
    "step",
    "train_loop",
]
