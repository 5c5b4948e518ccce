"""The dtype that weights are kept in, on disk and while a model is trained. Read `set_dtype` and `dtype_note`."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from frostline.recipe import Recipe
from frostline.units import format_share

_NAMES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
"""safetensors' names of floating-point dtypes → ours."""


def weights_dtype(recipe: Recipe) -> torch.dtype:
    """What the recipe keeps the model's weights in."""
    return torch.bfloat16 if recipe.precision == "bf16" else torch.float32


def set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the model's floating-point weights, in place, to `dtype`.

    As transformers does when it loads: parameters and the buffers that checkpoints hold, except those that a model
    wants in fp32 whatever is asked for.
    """
    strict: set[str] = set(model._keep_in_fp32_modules_strict or ())  # type: ignore[arg-type]
    kept = re.compile("|".join(rf"(^|\.){re.escape(n)}($|\.)" for n in sorted(strict)) or r"(?!)")
    saved = set(model.state_dict())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        wanted = torch.float32 if kept.search(name) else dtype
        if name in saved and tensor.is_floating_point() and tensor.dtype != wanted:
            tensor.data = tensor.data.to(wanted)
    model.config.dtype = dtype


def stored_dtypes(folder: Path) -> Counter[str]:
    """Floating-point dtype → elements, of the safetensors files of a folder; read from their headers."""
    found: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    part = file.get_slice(name)
                    if part.get_dtype() in _NAMES:
                        found[_NAMES[part.get_dtype()]] += torch.Size(part.get_shape()).numel()
        except (OSError, SafetensorError):
            continue  # loading the model says what is wrong with it
    return found


def dtype_note(recipe: Recipe) -> str | None:
    """What a run does to the dtype of its base's weights, if anything; None where they stay as they are."""
    folder = Path(recipe.model) if isinstance(recipe.model, str) else None
    if folder is None or not folder.is_dir():
        return None
    stored, kept = stored_dtypes(folder), "bf16" if recipe.precision == "bf16" else "fp32"
    total, others = sum(stored.values()), {n: k for n, k in stored.items() if n != kept}
    if not others:
        return None
    what = ", ".join(f"{format_share(k, total)} {n}" for n, k in others.items())
    if kept == "fp32" and set(others) == {"fp64"}:
        return f"weights: the base holds {what}: rounded to fp32 before the first step, in frozen parts too"
    if kept == "bf16":
        return (
            f"weights: the base holds {what}: rounded to bf16 before the first step, frozen parts too, and saved so; "
            "`precision: bf16-mixed` keeps them in fp32"
        )
    return (
        f"weights: the base holds {what}: trained and saved in fp32, which takes more memory and changes no value; "
        "`precision: bf16` keeps weights in bf16"
    )
