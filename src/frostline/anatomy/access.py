"""A model's tensors by name, and reading and writing the elements of a slice in one."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from frostline.anatomy.slices import Indices, Slice


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of the model as it is now, by name (a forward pass may replace a buffer)."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def take(tensor: torch.Tensor, piece: Slice) -> torch.Tensor:
    """The elements of `piece`, shape `piece.shape`; a view where one range per dimension allows, else a copy."""
    for dim, indices in enumerate(piece.index):
        tensor = _take_dim(tensor, dim, indices)
    return tensor


def put(tensor: torch.Tensor, piece: Slice, values: torch.Tensor) -> None:
    """Write `values` of shape `piece.shape` into the elements of `piece`, and into no other."""
    target = tensor
    for dim, indices in enumerate(piece.index):
        if len(indices) > 1:
            _put_by_index(tensor, piece, values)
            return
        target = _take_dim(target, dim, indices)
    target.copy_(values)


def _take_dim(tensor: torch.Tensor, dim: int, indices: Indices) -> torch.Tensor:
    if len(indices) == 1:
        r = indices[0]
        if r == range(tensor.shape[dim]):
            return tensor
        if r.step == 1:
            return tensor.narrow(dim, r.start, len(r))
        return tensor[(slice(None),) * dim + (slice(r.start, r.stop, r.step),)]
    return tensor.index_select(dim, _positions(indices, tensor.device))


def _put_by_index(tensor: torch.Tensor, piece: Slice, values: torch.Tensor) -> None:
    n_dims = len(piece.index)
    grid = tuple(
        _positions(indices, tensor.device).view([-1 if d == dim else 1 for d in range(n_dims)])
        for dim, indices in enumerate(piece.index)
    )
    tensor[grid] = values


def _positions(indices: Indices, device: torch.device) -> torch.Tensor:
    return torch.tensor([i for r in indices for i in r], device=device)


def fingerprint(tensor: torch.Tensor) -> str:
    """SHA-256 (hex) of a tensor's dtype, shape and bytes in row-major order; equal exactly when the bytes are."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(data.numpy().data)
    return digest.hexdigest()
