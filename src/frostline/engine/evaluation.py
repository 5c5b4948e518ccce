"""What a run is measured on beside its held-out data. Read `EvalSet`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from frostline.engine.step import Countable


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSet:
    """One set whose loss is measured, always on the same batches."""

    name: str
    batches: Sequence[Countable]
    bytes_per_target: float | None = None
    """UTF-8 bytes of text that a target stands for, over the whole set; None where that is not known."""


def bits_per_byte(loss: float, bytes_per_target: float | None) -> float | None:
    """Mean loss per target in nats → bits per byte of text, which does not depend on the tokenizer."""
    return None if not bytes_per_target else loss / math.log(2) / bytes_per_target
