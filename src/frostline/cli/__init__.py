"""The command line. A new command goes into the file of its topic; `app.py` holds what they share."""

# importing adds the commands, and the help page shows them in this order
# isort: off
from frostline.cli import runs, compare
from frostline.cli import schedules, data, costs
from frostline.cli import models, experts
from frostline.cli import claims

# isort: on
from frostline.cli.app import app, main

__all__ = ["app", "claims", "compare", "costs", "data", "experts", "main", "models", "runs", "schedules"]
