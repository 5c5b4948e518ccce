"""Buffers that a stage may move by a rule instead of a gradient: the correction biases of routers that learn.

DeepSeek-V3 and its kin add one number per expert to the scores before experts are chosen, and to nothing else: a
buffer, which no gradient reaches. It moves only in a stage that asks for it (`moe: {bias: 0.001}`), and only where the
router learns.
"""

from __future__ import annotations

from frostline.anatomy import Slice
from frostline.selection.selection import Selection


def buffers_by_rule(selection: Selection) -> tuple[Slice, ...]:
    """The correction biases of the routers of which something is selected, in the model's order."""
    anatomy = selection.anatomy
    out = []
    for component, _ in selection.by_component():
        if component.path[-1][0] == "router":
            tensors = ((s, anatomy.tensor[s.tensor]) for s in component.slices)
            out += [s for s, t in tensors if t.kind == "buffer" and t.persistent and len(t.shape) == 1]
    return tuple(out)
