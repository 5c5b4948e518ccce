"""A small file of what learned in a run, and a base with any number of them in it.

A delta holds the values of every piece that learned, the hashes of the base it belongs to, the dtype that the run held
its weights in, and the run's tokenizer where that is another than the base's (a chat template of its own, say);
`apply_deltas` verifies the base and puts any number of them in, as long as no two hold the same element. Read
`export_delta` first.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from frostline.anatomy import (
    Slice,
    fingerprint,
    intersect,
    named_tensors,
    put,
    reaches_outside,
    refine,
    slice_from_json,
    slice_to_json,
    take,
)
from frostline.audit import audit
from frostline.dtypes import weights_dtype
from frostline.errors import ModelError, RunFolderError
from frostline.export import check_outside, finished, new_folder
from frostline.model import load_model, load_tokenizer, save_model, untie
from frostline.recipe import Recipe, ScratchModel, load_recipe
from frostline.run_folder import RunFolder, checkpoint_of
from frostline.storage import appearing_whole
from frostline.tokenizer_files import tokenizer_files, tokenizer_from_files
from frostline.weights import Weights


def export_delta(run: str | Path, out: str | Path) -> Path:
    """Write what learned in a finished run, and moved, as one safetensors file.

    Raises as `export_run`, and `RunFolderError` for a run from scratch: its delta would have no base.
    """
    folder, target = finished(run), Path(out)
    if target.exists():
        raise RunFolderError(f"{out} exists; an export never overwrites")
    check_outside(folder, target)
    if not audit(folder.path).passed:
        raise RunFolderError(f"{run}: its audit fails, so it is not exported; see `frostline audit {run}`")
    boundaries, recipe = folder.read_boundaries(), load_recipe(folder.recipe)
    if isinstance(recipe.model, ScratchModel):
        raise RunFolderError(
            f"{run} began from a configuration (architecture: {recipe.model.architecture}), so there is no base that a "
            f"delta could be put into; export the model itself: frostline export {run} FOLDER"
        )
    learned = {str(p): p for s in folder.read_schedule() for p in s.learning}
    first, last = boundaries[0].hashes, boundaries[-1].hashes
    moved = {name: p for name, p in learned.items() if first[name] != last[name]}
    weights = Weights(folder.model, names={p.tensor for p in moved.values()})
    tensors = {name: take(weights[p.tensor], p).contiguous().clone() for name, p in moved.items()}
    tokenizer = {f"{_TOKENIZER}{name}": _as_tensor(content) for name, content in _own_tokenizer(folder, recipe).items()}
    head = {
        "schema": 1,
        "pieces": {name: slice_to_json(p) for name, p in moved.items()},
        "base": [
            {**slice_to_json(p), "sha256": first[str(p)]}
            for p in _pieces(folder)
            if p.tensor not in boundaries[0].derived
        ],
        "untied": recipe.ties == "untie",
        "dtype": "bf16" if weights_dtype(recipe) == torch.bfloat16 else "fp32",
        "sha256": {name: fingerprint(t) for name, t in (tensors | tokenizer).items()},
    }
    with appearing_whole(target) as temporary:
        save_file(tensors | tokenizer, temporary, metadata={"frostline_delta": json.dumps(head)})
    return target


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""How a delta names what its run held the weights in → that dtype."""
_TOKENIZER = "tokenizer/"
"""What the names of a tokenizer's files begin with in a delta; no piece of a model is called so."""


def _own_tokenizer(folder: RunFolder, recipe: Recipe) -> dict[str, bytes]:
    """The files of the run's tokenizer; none where it is the base's, as it came."""
    if isinstance(recipe.model, str) and recipe.tokenizer is None and recipe.data.chat_template is None:
        return {}
    tokenizer = _tokenizer_of(str(folder.model))
    return {} if tokenizer is None else tokenizer_files(tokenizer)


def _as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """One delta file, read."""

    path: Path
    values: dict[Slice, torch.Tensor]
    base: dict[Slice, str]
    """Piece → its hash in the model that the delta belongs to."""
    untied: bool
    dtype: str | None
    """`fp32` or `bf16`: what its run held the weights in, and rounded its base to. None of an old delta that holds no
    values, from which it would show."""
    tokenizer: dict[str, bytes]
    """The files of the run's tokenizer, where it is not the base's."""


def read_delta(path: str | Path) -> Delta:
    """Read a delta file; executes nothing. Raises `ModelError` when it is none, or damaged."""
    if Path(path).is_dir():
        raise ModelError(f"{path} is a folder, and no delta: frostline apply BASE DELTA… OUT")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "frostline_delta" not in metadata:
                raise ValueError("it holds plain weights; a delta is what `frostline export RUN FILE --delta` writes")
            head = json.loads(metadata["frostline_delta"])
            values = {slice_from_json(p): file.get_tensor(name) for name, p in head["pieces"].items()}
            files = {n: file.get_tensor(n) for n in file.keys() if n.startswith(_TOKENIZER)}  # noqa: SIM118
        if head["schema"] != 1 or any(tuple(t.shape) != p.shape for p, t in values.items()):
            raise ValueError("its pieces do not have the shapes it says")
        read = {n: values[slice_from_json(p)] for n, p in head["pieces"].items()} | files
        if any(fingerprint(t) != head["sha256"][n] for n, t in read.items()):
            raise ValueError("its values are not those that were written")
        if not head["base"]:
            raise ValueError("it does not say what base it belongs to")
        return Delta(
            path=Path(path),
            values=values,
            base={slice_from_json(row): row["sha256"] for row in head["base"]},
            untied=bool(head["untied"]),
            dtype=_dtype_of(head, values.values()),
            tokenizer={n.removeprefix(_TOKENIZER): bytes(t.numpy()) for n, t in files.items()},
        )
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no readable delta of a run: {error}") from None


def _dtype_of(head: Mapping[str, Any], values: Collection[torch.Tensor]) -> str | None:
    """What a delta says its dtype is; of an old one, which says nothing, that of its values."""
    if "dtype" in head:
        if head["dtype"] not in _DTYPES:
            raise ValueError(f"it is of weights in {head['dtype']!r}, and only {' and '.join(_DTYPES)} are known")
        return str(head["dtype"])
    if not values:
        return None
    return "bf16" if any(v.dtype == torch.bfloat16 for v in values) else "fp32"


def apply_deltas(base: str, deltas: Sequence[str | Path], out: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Put deltas into the base they belong to, and save the model folder `out`, with the tokenizer of their runs.

    Raises `ModelError` when the base is another one, when two deltas hold the same element or came with different
    tokenizers, or one is damaged.
    """
    target, base = new_folder(out), checkpoint_of(base)
    twice = {str(d) for d in deltas if [*map(str, deltas)].count(str(d)) > 1}
    if twice:
        raise ModelError(f"{sorted(twice)[0]} is given twice")
    read = [read_delta(d) for d in deltas]
    _check_apart(read)
    carried = _tokenizer_of_all(read)
    dtype = _dtype_of_all(read)
    model = load_model(base, dtype=dtype, trust_remote_code=trust_remote_code)
    has_cut = any(d.untied for d in read) and untie(model)
    if has_cut and not all(d.untied for d in read):
        raise ModelError(
            "some of the deltas belong to a model whose head was given weights of its own, and some do not"
        )
    for delta in read:
        _check_base(model, base, delta)
    tensors = named_tensors(model)
    with torch.no_grad():
        for delta in read:
            for piece, values in delta.values.items():
                put(tensors[piece.tensor], piece, values)
    if carried:
        tokenizer = tokenizer_from_files(carried, config=model.config, trust_remote_code=trust_remote_code)
    else:
        tokenizer = _tokenizer_of(base)
    with appearing_whole(target) as temporary:
        save_model(model, tokenizer, temporary)
    return target


def _dtype_of_all(deltas: Sequence[Delta]) -> torch.dtype:
    """What the base is loaded in: a run with bf16 weights has rounded all of it, so the hashes in its delta are of the
    rounded one. Raises `ModelError` where deltas differ."""
    known = [d for d in deltas if d.dtype is not None]
    other = next((d for d in known if d.dtype != known[0].dtype), None)
    if other is not None:
        raise ModelError(
            f"{known[0].path} is of a run with {known[0].dtype} weights, and {other.path} of one with {other.dtype}: "
            "apply one of them"
        )
    return _DTYPES[str(known[0].dtype)] if known else torch.float32


def _tokenizer_of_all(deltas: Sequence[Delta]) -> dict[str, bytes]:
    """The files of the tokenizer that deltas came with, if any did. Raises `ModelError` where they differ."""
    own = [d for d in deltas if d.tokenizer]
    other = next((d for d in own if d.tokenizer != own[0].tokenizer), None)
    if other is not None:
        differ = [n for n in own[0].tokenizer | other.tokenizer if own[0].tokenizer.get(n) != other.tokenizer.get(n)]
        raise ModelError(
            f"{own[0].path} and {other.path} were trained with different tokenizers or chat templates "
            f"({', '.join(sorted(differ))} differ): apply one of them"
        )
    return own[0].tokenizer if own else {}


def _check_apart(deltas: Sequence[Delta]) -> None:
    for i, first in enumerate(deltas):
        for second in deltas[i + 1 :]:
            for a in first.values:
                for b in (p for p in second.values if p.tensor == a.tensor):
                    if intersect(a, b) is not None:
                        raise ModelError(
                            f"{first.path} and {second.path} both hold elements of {a.tensor}: apply one of them"
                        )


def _check_base(model: nn.Module, base: str, delta: Delta) -> None:
    tensors = named_tensors(model)
    foreign = [
        str(p)
        for p, value in delta.values.items()
        if p.tensor not in tensors
        or reaches_outside(p, tuple(tensors[p.tensor].shape))
        or value.dtype != tensors[p.tensor].dtype
    ]
    if foreign:
        raise ModelError(f"{base} has no place for what {delta.path} holds: {', '.join(foreign[:3])}")
    wrong = [
        str(piece)
        for piece, expected in delta.base.items()
        if piece.tensor not in tensors
        or reaches_outside(piece, tuple(tensors[piece.tensor].shape))
        or fingerprint(take(tensors[piece.tensor], piece)) != expected
    ]
    if wrong:
        old = "; an old delta without values does not say whether its run was in bf16: export it again"
        raise ModelError(
            f"{base} is not the model that {delta.path} belongs to: {len(wrong)} of {len(delta.base)} pieces differ "
            f"({', '.join(wrong[:3])}); give the model that its run started from{old if delta.dtype is None else ''}"
        )


def _pieces(folder: RunFolder) -> tuple[Slice, ...]:
    """Every piece that a run's hashes are of."""
    anatomy = folder.read_anatomy()
    pieces = [s for c in anatomy.components for s in c.slices if s.tensor not in anatomy.ties]
    for stage in folder.read_schedule():
        pieces = [*refine(pieces, stage.learning)]
    return tuple(pieces)


def _tokenizer_of(base: str) -> Any:
    try:
        return load_tokenizer(base)
    except ModelError:
        return None
