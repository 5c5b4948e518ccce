"""How many bytes a stage holds beside the model, by the optimizers' own layouts. Read `stage_bytes`."""

from __future__ import annotations

from collections.abc import Callable

from frostline.anatomy import Slice, whole
from frostline.engine.optimizers import leaves, matrices_of
from frostline.engine.owned import leaf_shape
from frostline.engine.rounding import Rounding, stepped_bytes
from frostline.schedule import Stage


def stage_bytes(stage: Stage, element_bytes: Callable[[str], int], rounding: Rounding = "nearest") -> int:
    """Bytes of gradients, optimizer state and copies (of slices, and fp32 masters) in a stage."""
    shapes = {t.name: t.shape for t in stage.selection.anatomy.tensors}

    def leaf_bytes(tensor: str) -> int:
        return max(element_bytes(tensor), 4) if rounding == "masters" else element_bytes(tensor)

    def is_copy(p: Slice) -> bool:
        return p != whole(p.tensor, shapes[p.tensor]) or leaf_bytes(p.tensor) != element_bytes(p.tensor)

    gradients = sum(s.n_elements * leaf_bytes(s.tensor) for s in stage.selection.slices)
    copies = sum(p.n_elements * leaf_bytes(p.tensor) for p in leaves(stage, ()) if is_copy(p))
    return gradients + copies + state_bytes(stage, lambda t: stepped_bytes(element_bytes(t), rounding))


def state_bytes(stage: Stage, dtype_bytes: Callable[[str], int]) -> int:
    """Bytes of optimizer state after the stage's first step, by the optimizers' own layouts.

    `dtype_bytes`: tensor name → bytes per element. 8-bit AdamW: without the constants of its blocks (3 %).
    """
    spec, anatomy = stage.spec.optimizer, stage.selection.anatomy
    matrices = matrices_of(anatomy)
    total = 0
    for piece in leaves(stage, ()):
        shape, size = leaf_shape(piece.shape), dtype_bytes(piece.tensor)
        match spec.name:
            case "sgd":
                total += piece.n_elements * size if spec.momentum else 0
            case "lion":
                total += piece.n_elements * size
            case "adafactor":
                factored = len(shape) > 1
                total += size * (
                    (shape[-1] + shape[-2]) * (piece.n_elements // (shape[-1] * shape[-2]))
                    if factored
                    else piece.n_elements
                )
            case "adamw8bit":
                total += piece.n_elements * (2 if piece.n_elements >= 4096 else 8)
            case "muon" if piece.tensor in matrices and len(shape) == 2:
                total += piece.n_elements * size
            case _:
                total += 2 * piece.n_elements * size
    return total
