"""Writing the evidence of a run into its folder: hashes at boundaries, entry values, gradients, metrics, timing.

`pieces` is what the evidence is kept for: the slices of every component, cut wherever a stage's selection cuts them,
so that in every stage a piece learns as a whole or not at all. Read `Recorder` first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from frostline.anatomy import Anatomy, Slice, fingerprint, named_tensors, put, refine, take
from frostline.engine.event_rows import rows_of
from frostline.engine.events import Event, RolledBack, StageEnded
from frostline.engine.owned import Ownership
from frostline.engine.rounding import Rounding, Shown, n_shown
from frostline.engine.stage_bytes import stage_bytes
from frostline.errors import RunFolderError
from frostline.run_folder import Boundary, RunFolder, StageRecord, damaged_records
from frostline.schedule import Schedule, Stage
from frostline.selection import Selection
from frostline.storage import storage_errors


def cut_pieces(anatomy: Anatomy, selections: list[Selection]) -> tuple[Slice, ...]:
    """The slices of every component, cut so that each selection takes a piece whole or not at all."""
    pieces = [s for c in anatomy.components for s in c.slices if s.tensor not in anatomy.ties]
    for selection in selections:
        pieces = [*refine(pieces, selection.slices)]
    return tuple(pieces)


class Recorder:
    """Writes one run's evidence. It only reads the model.

    `loop`: `own` for a loop of the user's, whose settings and durations no recipe says.
    """

    def __init__(
        self,
        folder: RunFolder,
        model: nn.Module,
        anatomy: Anatomy,
        schedule: Schedule,
        *,
        gradients_every: int,
        loop: Literal["recipe", "own"] = "recipe",
        rounding: Rounding = "nearest",
    ) -> None:
        self.folder, self.model, self.rounding = folder, model, rounding
        self.gradients_every = gradients_every
        self.anatomy, self.loop = anatomy, loop
        self.pieces = cut_pieces(anatomy, [s.selection for s in schedule.stages])
        self.learning = [
            tuple(p for p in self.pieces if p in s.by_rule or s.selection.within(p)) for s in schedule.stages
        ]
        self.at_switch = schedule.at_switch
        self._hashes: list[dict[str, str]] = []
        self._norms: dict[str, list[float | None]] = {}
        self._updates: dict[str, tuple[int, int]] = {}
        self._drifted: dict[str, None] = {}
        self._updated = False
        folder.write_anatomy(anatomy)
        self.lay(schedule)

    def lay(self, schedule: Schedule) -> None:
        """Write the schedule as it is now: a stage that ended early moves those after it."""
        size = schedule.step_size
        self.folder.write_schedule(
            [self._stage_record(s) for s in schedule.stages],
            step_size=None if size is None else asdict(size),
            loop=self.loop,
            at_switch=self.at_switch,
        )

    def _stage_record(self, stage: Stage) -> StageRecord:
        return StageRecord(
            index=stage.index,
            name=stage.name,
            learn=stage.selection.expression,
            start=stage.start,
            end=stage.end,
            n_learning=stage.selection.n_elements,
            learning=self.learning[stage.index],
            settings=stage.spec.model_dump(mode="json") if self.loop == "recipe" else {},
        )

    def boundary(self, index: int, *, step: int, derived: tuple[str, ...] = (), between: bool = False) -> None:
        """Record the hash of every piece; `between` two stages that run to their ends, as the recipe says."""
        tensors = named_tensors(self.model)
        pieces: Iterable[Slice] = self.pieces
        if between and self.at_switch == "changing":
            pieces = dict.fromkeys((*self.learning[index - 1], *self.learning[index]))
        hashes = {str(p): fingerprint(take(tensors[p.tensor], p)) for p in pieces}
        self._hashes = [*self._hashes[-1:], hashes]
        self.folder.write_boundary(Boundary(index=index, step=step, hashes=hashes, derived=derived))

    def resume(self, stage: Stage, drifted: tuple[str, ...], *, ended: bool) -> None:
        """Go on in the middle of `stage`, from what the folder holds; `ended`: at its end, its records written."""
        self._hashes = [self.folder.read_boundaries()[-1].hashes]
        self._norms, self._drifted, self._updates, self._updated = {}, {}, {}, False
        if ended:
            return
        self._drifted = dict.fromkeys(drifted)
        rows = self.folder.read_lines(self.folder.metrics)
        self._updated = any(r["stage"] == stage.name and "loss" in r and not r.get("skipped") for r in rows)
        for sample in self.folder.read_gradients():
            if sample.stage == stage.index:
                for name, norm in sample.norms.items():
                    self._norms.setdefault(name, []).append(norm)
        for measured in self.folder.read_updates():
            if measured.stage == stage.index:
                self._add_updates(measured.updates)

    @property
    def drifts(self) -> tuple[str, ...]:
        """Buffers that had to be put back in the stage in progress."""
        return tuple(self._drifted)

    def learned(self, stage: Stage) -> tuple[Slice, ...]:
        """Every piece that has learned up to and in `stage`."""
        return tuple(dict.fromkeys(p for pieces in self.learning[: stage.index + 1] for p in pieces))

    def entry(self, stage: Stage) -> None:
        """Keep the values of what `stage` starts to train."""
        tensors = named_tensors(self.model)
        values = {
            str(p): take(tensors[p.tensor].detach(), p).cpu().clone(memory_format=torch.contiguous_format)
            for p in self._kept_at(stage)
        }
        with storage_errors(self.folder.entry(stage.index)):
            save_file(values, self.folder.entry(stage.index))

    def _kept_at(self, stage: Stage) -> Iterable[Slice]:
        """What of a stage's entry values is kept."""
        pieces = self.learning[stage.index]
        if self.at_switch == "everything":
            return pieces
        before = {p for earlier in self.learning[: stage.index] for p in earlier}
        return [p for p in pieces if p not in before]

    def put_entry(self, stage: Stage) -> None:
        """Put back what `stage` started to train. Raises `RunFolderError` unless it is what was recorded then."""
        start, pieces = self.folder.read_boundaries()[stage.index].hashes, self.learning[stage.index]
        with damaged_records(self.folder.path), safe_open(self.folder.entry(stage.index), framework="pt") as file:
            values = {p: file.get_tensor(str(p)) for p in pieces}
            wrong = [str(p) for p, v in values.items() if fingerprint(v) != start[str(p)]]
        if wrong:
            raise RunFolderError(f"{self.folder.entry(stage.index)}: {wrong[0]} is not what the stage started with")
        tensors = named_tensors(self.model)
        with torch.no_grad():
            for piece, value in values.items():
                put(tensors[piece.tensor], piece, value.to(tensors[piece.tensor].device))

    def is_due(self, stage: Stage, step: int) -> bool:
        """Whether `step` (steps done, this one included) is sampled."""
        return step % self.gradients_every == 0 or step in (stage.start + 1, stage.end)

    def gradients(self, stage: Stage, step: int, ownership: Ownership) -> None:
        """Called before an update: record the gradient norm of every learning piece, if `step` is sampled."""
        self._updated = True
        if not self.is_due(stage, step):
            return
        norms = {}
        for piece in filter(self.anatomy.learnable, self.learning[stage.index]):
            gradient = ownership.gradient(piece)
            norms[str(piece)] = None if gradient is None else torch.linalg.vector_norm(gradient).item()
            self._norms.setdefault(str(piece), []).append(norms[str(piece)])
        row = {"step": step, "stage": stage.index, "norms": norms, "stray": self._stray(stage, ownership)}
        self.folder.append(self.folder.gradients, row)

    def updates(self, stage: Stage, step: int, shown: Mapping[Slice, Shown]) -> None:
        """Record, for every learning piece in fewer bits than fp32, how much of a measured step it shows."""
        if not shown:
            return
        counts = {str(p): n_shown(shown, p) for p in self.learning[stage.index]}
        found = {name: n for name, n in counts.items() if n is not None}
        self._add_updates(found)
        row = {"step": step, "stage": stage.index, "rounding": self.rounding, "updates": found}
        self.folder.append(self.folder.updates, row)

    def _add_updates(self, found: Mapping[str, tuple[int, int]]) -> None:
        for name, (wanted, lost) in found.items():
            before = self._updates.get(name, (0, 0))
            self._updates[name] = (before[0] + wanted, before[1] + lost)

    def _stray(self, stage: Stage, ownership: Ownership) -> list[str]:
        """Parameters with a gradient that no leaf owns, or whose `requires_grad` is not what the stage says."""
        learning = {s.tensor for s in stage.selection.slices}
        leaves = {id(o.value) for o in ownership.owned}
        return [
            name
            for name, p in self.model.named_parameters()
            if (p.grad is not None and id(p) not in leaves)
            or p.requires_grad != (self.anatomy.storage_name(name) in learning)
        ]

    def drifted(self, names: list[str]) -> None:
        """Note buffers that had to be put back."""
        self._drifted |= dict.fromkeys(names)

    def ended(self, stage: Stage, *, n_skipped: int, following: Stage | None) -> StageEnded:
        """What happened in a stage whose last boundary is written; starts the notes of the next one."""
        before, after = self._hashes
        still = [str(p) for p in self.learning[stage.index] if before[str(p)] == after[str(p)]]
        event = StageEnded(
            stage=stage,
            step=stage.end,
            n_skipped=n_skipped,
            n_moved=len(self.learning[stage.index]) - len(still),
            unmoved=tuple((name, self._why_unmoved(name)) for name in still),
            buffers_restored=tuple(self._drifted),
            following=following,
            following_bytes=stage_bytes(following, self._element_bytes, self.rounding) if following else 0,
            lost_updates=self._lost(),
        )
        self._norms, self._drifted, self._updates, self._updated = {}, {}, {}, False
        return event

    def _why_unmoved(self, name: str) -> str:
        """What is known of a learning piece that did not move: whether there was an update, and its gradients."""
        norms = self._norms.get(name, [])
        if not self._updated:
            return "every step was skipped"
        if not norms or all(n is None for n in norms):
            return "no gradient arrived"
        if any(norms) and self._updates.get(name, (1, 0))[0] == 0:
            return "no update was made of its gradient"
        return "its gradient is zero" if not any(norms) else "every step was too small for its next number"

    def _took_back(self, event: RolledBack) -> None:
        """Say in every record of steps that those since the checkpoint do not count; they stay where they are."""
        marker = {"step": event.step, "rolled_back_to": event.to}
        numbers = {"loss": event.why.loss, "gradient_norm": event.why.gradient_norm}
        more = {"stage": event.stage.name, **numbers, "left_out": list(event.left_out), "why": str(event.why)}
        self.folder.append(self.folder.metrics, {**marker, **more})
        for path in (self.folder.gradients, self.folder.updates, self.folder.flow):
            if path.exists():
                self.folder.append(path, marker)

    def loss_warning(self, stage: Stage) -> str | None:
        """What to say of a stage that loses updates to rounding, by its first step; None below 1 %."""
        lost = self._lost()
        if lost is None or lost < 0.01:
            return None
        return (
            f"  stage {stage.name}: {100 * lost:.0f} % of the first step's updates are LOST: bf16 has no number near "
            "enough, and weights are rounded to the nearest. `rounding: masters` keeps updates in fp32 copies of what "
            "learns, `rounding: stochastic` on average"
        )

    def _lost(self) -> float | None:
        """The share of the updates of narrow weights that rounding to nearest has lost, where it was measured."""
        wanted, lost = (sum(n[k] for n in self._updates.values()) for k in (0, 1))
        return lost / wanted if wanted and self.rounding == "nearest" else None

    def _element_bytes(self, tensor: str) -> int:
        return self.anatomy.tensor[tensor].element_bytes

    def event(self, event: Event) -> None:
        """Write what an event adds to the records of the run."""
        if isinstance(event, RolledBack):
            self._took_back(event)
        for path, row in rows_of(event, self.folder):
            self.folder.append(path, row)
