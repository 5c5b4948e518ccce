"""What is wrong with a path, said at its column, with what there is instead.

Every name and every index in a path must exist, and lead somewhere by itself. Read `PathCheck.check`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from frostline.anatomy import Cut
from frostline.errors import SelectionError, did_you_mean
from frostline.selection.grammar import Item, Path, PathSegment, Ranked
from frostline.selection.names import GROUPS, Names, Steps, in_range, indices, known_names, written

ErrorAt = Callable[[str, int], SelectionError]
"""(message, column) → the error that points there."""


class PathCheck:
    """One path against the names of one model."""

    def __init__(self, path: Path, names: Names, error: ErrorAt) -> None:
        self.path, self.names, self.error = path, names, error
        self.steps, self.group = names.split(path)

    def check(self) -> None:
        """Raise `SelectionError` for the first mistake: an unknown name before one that is out of place."""
        self.check_group()
        self.check_names()
        self.check_cuts()
        self.check_indices()
        self.check_every_choice()

    def check_group(self) -> None:
        """A group takes no index."""
        last = self.path.segments[-1]
        if self.group is not None and last.items is not None:
            raise self.error(f"'{last.names[0]}' is a group and takes no index", last.items[0].column)

    def check_names(self) -> None:
        """Every name must be a part or a cut of this model."""
        for k, step in enumerate(self.steps):
            for name, column in zip(step.names, step.columns, strict=True):
                if name not in self.names.parts and name not in self.names.cuts:
                    raise self.unknown(name, self.steps[:k], column)

    def unknown(self, name: str, before: Steps, column: int) -> SelectionError:
        """That no part has this name, or that it is a group's and stands where no group can."""
        if name in GROUPS:
            return self.error(f"the group '{name}' can only stand alone or at the end of a path", column)
        if before and self.names.fitting(before):
            return self.no_part_inside(name, before, column)
        known = known_names(self.names.anatomy)
        near = self.in_tensor_names(name) or did_you_mean(name, known)
        listed = "" if near else f" Known parts: {', '.join(known)}."
        return self.error(f"this model has no part '{name}'.{near}{listed}", column)

    def in_tensor_names(self, name: str) -> str:
        """Of a name that stands in tensors' own names, such as `mlp`: the part that they belong to, and how to write
        the tensors themselves. Empty for every other name."""
        anatomy = self.names.anatomy
        own = {s.tensor for c in anatomy.components for s in c.slices if name in s.tensor.split(".")}
        paths = [[n for n, _ in c.path] for c in anatomy.components if any(s.tensor in own for s in c.slices)]
        shared = [n for n in (paths[0] if paths else ()) if all(n in path for path in paths)]
        part = ".".join(shared[1:] if len(shared) > 1 and shared[0] == "layers" else shared)
        if not part:
            return ""
        pattern = f"*.{name}.*" if all(f".{name}." in tensor for tensor in own) else f"*{name}.*"
        return f" It is in the names of tensors that belong to '{part}': write that, or param(\"{pattern}\")."

    def no_part_inside(self, name: str, before: Steps, column: int) -> SelectionError:
        """That what `before` names has no part of that name, and which it has."""
        inside = self.names.after(before)
        hint = did_you_mean(name, inside) + (f" It has: {', '.join(inside)}." if inside else "")
        return self.error(f"'{written(before)}' has no part '{name}' directly inside.{hint}", column)

    def check_cuts(self) -> None:
        """A cut divides several parts at once: nothing can follow it, and it stands alone in its step."""
        for k, step in enumerate(self.path.segments):
            cut = next((name for name in step.names if name in self.names.cuts - self.names.parts), None)
            if cut is None:
                continue
            if len(step.names) > 1:
                message = f"'{cut}' cannot stand in braces with others: join them with '|'"
                raise self.error(message, step.columns[step.names.index(cut)])
            if k < len(self.path.segments) - 1:
                raise self.follows_a_cut(cut, k)

    def follows_a_cut(self, cut: str, k: int) -> SelectionError:
        """That something follows the cut in step `k`, and how to write what was meant."""
        steps, follows = self.path.segments, self.path.segments[k + 1]
        is_group = k == len(steps) - 2 and follows.names[0] in set(GROUPS) - self.names.parts
        part = follows.names[0] if is_group else written((*steps[:k], follows))
        return self.error(
            f"nothing can follow '{cut}', which divides several parts at once: write "
            f"'{written(steps[: k + 1])} & {part}'",
            follows.columns[0],
        )

    def check_indices(self) -> None:
        """Every index must exist somewhere."""
        for step in self.steps:
            for item in step.items or ():
                self.check_index(step, item)

    def check_index(self, step: PathSegment, item: Item) -> None:
        """One index: of something that is counted, and not above every count."""
        name = step.names[0]
        if isinstance(item.value, Ranked):
            raise self.error(_not_measured(f"{name}[{item.text}]"), item.column)
        counts = {n for (_, counted), n in self.names.counts.items() if counted in step.names}
        if not counts:
            raise self.error(f"'{name}' takes no index", item.column)
        if not any(in_range(item, n) for n in counts):
            n = max(counts)
            if _is_empty(item, n):
                raise self.empty(name, item)
            raise self.error(f"{name}[{item.text}] is out of range: there are {n}, 0 to {n - 1}", item.column)

    def empty(self, name: str, item: Item) -> SelectionError:
        """That nothing lies between the two ends of a range."""
        return self.error(f"{name}[{item.text}] is empty: a range ends before its second number", item.column)

    def check_every_choice(self) -> None:
        """Every name in braces, and every index where it stands, must lead somewhere by itself."""
        for k, step in enumerate(self.steps):
            for name, column in zip(step.names, step.columns, strict=True):
                self.check_name(k, PathSegment((name,), (column,), step.items))
            for item in step.items or ():
                self.check_index_here(k, item)
        if not self.names.matched(self.steps, self.group):
            raise self.error(f"'{self.path.text}' matches no part of this model", self.path.column)

    def check_index_here(self, k: int, item: Item) -> None:
        """One index of step `k`, after what stands before it."""
        before, step = self.steps[:k], self.steps[k]
        everywhere = self.names.fitting((*before, replace(step, items=None)))
        short = [c for c in everywhere if isinstance(c, Cut) and not in_range(item, c.n)]
        if short and _is_empty(item, short[0].n):
            raise self.empty(short[0].name, item)
        if short:  # unlike layers, heads and neurons of every layer that is named must exist
            raise self.error(f"{short[0].name}[{item.text}] is out of range: there are {short[0].n}", item.column)
        if not self.names.fitting((*before, replace(step, items=(item,)))):
            place = written(before) or "this model"
            raise self.error(f"{step.names[0]}[{item.text}] is out of range in {place}", item.column)

    def check_name(self, k: int, alone: PathSegment) -> None:
        """One name of step `k`: after what stands before it, and, among several in braces, with what follows."""
        before, rest = self.steps[:k], self.steps[k + 1 :]
        (name,), (column,) = alone.names, alone.columns
        if not self.names.fitting((*before, replace(alone, items=None))):
            if not k:
                raise self.error(f"'{name}' matches nothing that could learn", column)
            raise self.no_part_inside(name, before, column)
        if len(self.steps[k].names) == 1 or self.names.matched((*before, alone, *rest), self.group):
            return  # what follows a single name is reported when its turn comes
        if alone.items and not self.names.fitting((*before, alone)):
            raise self.error(f"'{name}' cannot take this index", column)
        follows = written(self.path.segments[k + 1 :])
        raise self.error(f"'{name}' has nothing that fits '{follows}'", column)


def _is_empty(item: Item, n: int) -> bool:
    """Whether both ends of a range exist among `n`, and nothing lies between them."""
    if not isinstance(item.value, slice):
        return False
    ends = [e for e in (item.value.start, item.value.stop) if e is not None]
    return all(-n <= e <= n for e in ends) and not indices(item, n)


def _not_measured(text: str) -> str:
    return (
        f"'{text}' depends on which experts a text uses, and nothing was measured.\n"
        "  `frostline select MODEL EXPRESSION --data FILE` measures it and prints the experts by number;\n"
        "  `frostline train` measures it on the training data when it starts."
    )
