"""Schedules: stages with resolved boundaries, as a table with a pure lookup. Read `schedule.py`."""

from frostline.schedule.schedule import Schedule, Stage, lr_at

__all__ = ["Schedule", "Stage", "lr_at"]
