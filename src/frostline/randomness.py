"""All randomness is a pure function of (seed, purpose, numbers): there is no generator state to save."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed for one use, such as `derive_seed(0, "dropout", step, micro_batch)`; equal on every machine."""
    text = ":".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
