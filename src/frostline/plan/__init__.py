"""Plans: what a run will cost, from one abstract execution of its steps. Read `plan.py`, then `trace.py`."""

from frostline.plan.calibrate import time_stage
from frostline.plan.check import StageCheck, StepMeters, check_plan, checks_to_json
from frostline.plan.cost import StageCost
from frostline.plan.meter import KINDS, Device, Kind, Meter
from frostline.plan.plan import Batching, Plan, StagePlan, like, make_plan, plan_to_json, points_for
from frostline.plan.prefix_worth import why_not_worth
from frostline.plan.shapes import StepShape
from frostline.plan.trace import trace_stage

__all__ = [
    "KINDS",
    "Batching",
    "Device",
    "Kind",
    "Meter",
    "Plan",
    "StageCheck",
    "StageCost",
    "StagePlan",
    "StepMeters",
    "StepShape",
    "check_plan",
    "checks_to_json",
    "like",
    "make_plan",
    "plan_to_json",
    "points_for",
    "time_stage",
    "trace_stage",
    "why_not_worth",
]
