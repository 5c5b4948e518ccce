"""A run's model as it was before any of its stages: the final weights, with kept entry values put back."""

from __future__ import annotations

import torch
from safetensors import safe_open
from torch import nn

from frostline.anatomy import fingerprint, named_tensors, put, refine, take
from frostline.errors import RunFolderError
from frostline.run_folder import RunFolder


def rewind(model: nn.Module, run: RunFolder, stage: int) -> None:
    """Turn a run's final model, in place, into what it was before stage `stage` (0-based).

    What a stage did not train did not change in it, so the entry values of the stages from the last one down to
    `stage` are all there is to put back. Raises `RunFolderError` when the result is not what was recorded then.
    """
    if stage and not run.keeps_all_at_switches():
        raise RunFolderError(f"{run.path} keeps no values of the stages in between (evidence.at_switch: changing)")
    anatomy, stages, boundaries = run.read_anatomy(), run.read_schedule(), run.read_boundaries()
    parameters, tensors = dict(model.named_parameters(remove_duplicate=False)), named_tensors(model)
    for record in reversed(stages[stage : len(boundaries) - 1]):
        with torch.no_grad(), safe_open(run.entry(record.index), framework="pt") as file:
            kept = set(file.keys())
            for piece in (p for p in record.learning if str(p) in kept):
                put(tensors[piece.tensor], piece, file.get_tensor(str(piece)))
    recorded = boundaries[stage].hashes
    pieces = [s for c in anatomy.components for s in c.slices if s.tensor not in anatomy.ties]
    for record in stages:
        pieces = [*refine(pieces, record.learning)]
    for piece in pieces:
        if piece.tensor in parameters and fingerprint(take(parameters[piece.tensor], piece)) != recorded[str(piece)]:
            raise RunFolderError(f"{run.path}: {piece} cannot be taken back to stage {stages[stage].name}")
