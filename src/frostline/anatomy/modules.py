"""From a part's name to the module that computes it."""

from __future__ import annotations

from torch import nn

from frostline.anatomy.component import Anatomy, parse_path
from frostline.errors import AnatomyError


def module_of(model: nn.Module, anatomy: Anatomy, part: str) -> nn.Module:
    """The smallest module that holds every tensor of `part`, such as `layers[3].attn`. Raises `AnatomyError`."""
    path = parse_path(part)
    names = [s.tensor for c in anatomy.components if c.path[: len(path)] == path for s in c.slices]
    if not names:
        raise AnatomyError(f"this model has no part '{part}'")
    common = names[0].split(".")[:-1]
    for name in names:
        steps = name.split(".")[:-1]
        shared = next((i for i, (a, b) in enumerate(zip(common, steps, strict=False)) if a != b), len(steps))
        common = common[:shared]
    return model.get_submodule(".".join(common))
