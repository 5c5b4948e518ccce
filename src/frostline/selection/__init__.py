"""Selections: what learns, as an expression and as a set of slices. Read `selection.py`, then `grammar.py`."""

from frostline.selection.grammar import parse
from frostline.selection.selection import GROUPS, Match, Selection, known_names, select, selection_to_json

__all__ = ["GROUPS", "Match", "Selection", "known_names", "parse", "select", "selection_to_json"]
