"""Schedules: stages with resolved boundaries, as a table with a pure lookup. Read `schedule.py`, then `groups.py`."""

from frostline.schedule.groups import Group, make_groups, norms_and_biases
from frostline.schedule.routes import Route, make_routes
from frostline.schedule.schedule import Schedule, Stage, StepSize, plateaued

__all__ = [
    "Group",
    "Route",
    "Schedule",
    "Stage",
    "StepSize",
    "make_groups",
    "make_routes",
    "norms_and_biases",
    "plateaued",
]
