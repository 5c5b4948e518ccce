"""The command line. A new command goes into the file of its topic; `app.py` holds what they share."""

from frostline.cli import claims, costs, data, experts, models, runs, schedules  # noqa: F401  importing them adds their commands
from frostline.cli.app import app, main

__all__ = ["app", "main"]
