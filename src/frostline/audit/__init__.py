"""The audit: what a run's own files say happened. Read `audit.py`, `checks.py`, then `states.py`."""

from frostline.audit.audit import audit, audit_to_json
from frostline.audit.diff import Diff, DiffRow, diff_checkpoints, diff_to_json
from frostline.audit.movement import Movement, measure
from frostline.audit.rewind import rewind
from frostline.audit.verdicts import FAILED, Audit, Evidence, Row

__all__ = [
    "FAILED",
    "Audit",
    "Diff",
    "DiffRow",
    "Evidence",
    "Movement",
    "Row",
    "audit",
    "audit_to_json",
    "diff_checkpoints",
    "diff_to_json",
    "measure",
    "rewind",
]
