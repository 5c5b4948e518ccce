"""The command line. A new command goes into the file of its topic; `app.py` holds what they share."""

# isort: off  # importing adds the commands, and the help page shows them in this order
from frostline.cli import (  # noqa: F401  # noqa: F401
    claims,
    costs,
    data,
    experts,
    models,
    runs,
    schedules,
)

# isort: on
from frostline.cli.app import app, main

__all__ = ["app", "main"]
