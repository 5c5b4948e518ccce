"""Selections: what learns, as an expression and as a set of slices. Read `selection.py`, `resolve.py`, `grammar.py`."""

from frostline.selection.by_rule import buffers_by_rule
from frostline.selection.grammar import SCORES, parse
from frostline.selection.names import GROUPS, known_names
from frostline.selection.outside import Needs, Scores, chosen, expression_of, needs, plain
from frostline.selection.resolve import Match
from frostline.selection.selection import Difference, Selection, compare, select, selection_to_json, shared_heads

__all__ = [
    "GROUPS",
    "SCORES",
    "Difference",
    "Match",
    "Needs",
    "Scores",
    "Selection",
    "buffers_by_rule",
    "chosen",
    "compare",
    "expression_of",
    "known_names",
    "needs",
    "parse",
    "plain",
    "select",
    "selection_to_json",
    "shared_heads",
]
