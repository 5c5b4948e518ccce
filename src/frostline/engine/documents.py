"""Attention that stays inside documents, for rows that hold several: one call per document, or one kernel for all.

On a CPU, and in fp32 on CUDA, torch's causal attention is called for every document by itself, so that nothing is
computed between documents and no mask is built. On CUDA in half precision one variable-length kernel (flash attention,
part of torch) takes all of them. transformers finds both under the name `NAME`; a model's layers pass the documents on.
Read `document_attention` first.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from frostline.data import Documents

NAME = "frostline_documents"
"""What transformers knows the attention by."""


def use_document_attention(model: nn.Module) -> None:
    """Let `model` attend within the documents of its rows; before it is compiled. Raises what transformers raises."""
    AttentionInterface.register(NAME, document_attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)  # type: ignore[operator]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def document_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of (rows, heads, length, width) within each document → (rows, length, heads, width).

    Without `documents` every row is one. Padding after a row's documents gets zeros. A mask is for calls that are not
    training (generation): transformers' own function then does all of it.
    """
    if settings.get("softcap") is not None:  # transformers up to 5.20 leaves it out silently, and so would the kernel
        raise ValueError("torch's attention has no cap on scores (`softcap`)")
    rows, length = query.shape[0], query.shape[2]
    if attention_mask is not None or key.shape[2] != length:
        whole: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)[0]
        return whole, None
    documents = documents or Documents(((length,),) * rows)
    if _one_kernel(query, key, value, sliding_window, settings):
        return _variable_length(query, key, value, documents, sliding_window, settings), None
    out = []
    for row in range(rows):
        parts = []
        for start, end in documents.spans(row):
            q, k, v = (t[row : row + 1, :, start:end] for t in (query, key, value))
            mask = _window(end - start, sliding_window, query.device)
            parts.append(sdpa_attention_forward(module, q, k, v, mask, **settings)[0])
        rest = length - sum(documents.lengths[row])
        if rest:
            parts.append(query.new_zeros(1, rest, query.shape[1], value.shape[-1]))
        out.append(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
    return torch.cat(out) if rows > 1 else out[0], None


def _mask(*_: Any, **given: Any) -> torch.Tensor | None:
    """The mask that transformers is to make: none for whole rows, whose documents need none; else its own."""
    if given.get("attention_mask") is None and given["q_length"] == given["kv_length"]:
        return None
    mask: torch.Tensor | None = sdpa_mask(**given)
    return mask


def _window(length: int, width: int | None, device: torch.device) -> torch.Tensor | None:
    """What a token sees where only the last `width` are seen, (1, 1, length, length); None where that is all before."""
    if width is None or length <= width:
        return None
    back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    return ((back >= 0) & (back < width))[None, None]


def _one_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, settings: dict[str, Any]
) -> bool:
    """Whether torch has a kernel for all documents at once that takes these tensors."""
    if not query.is_cuda or settings.get("dropout") or settings.get("position_bias") is not None:
        return False
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    widths = {query.shape[-1], key.shape[-1], value.shape[-1]}
    if half not in (torch.float16, torch.bfloat16) or len(widths) > 1 or max(widths) > 256 or max(widths) % 8:
        return False
    return window is None or _takes_windows()


def _takes_windows() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters


def _variable_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    window: int | None,
    settings: dict[str, Any],
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows, _, length, _ = query.shape
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # torch 2.10 has no grouped queries here
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, k, v = (t.transpose(1, 2).flatten(0, 1).to(half) for t in (query, key, value))
    each = [n for row in documents.lengths for n in (*row, length - sum(row)) if n]  # padding as a document
    ends = torch.tensor([0, *each], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(query.device)
    if _takes_windows():
        span: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    else:
        span = {"is_causal": True}
    scale = settings.get("scaling")
    out = varlen_attn(q, k, v, ends, ends, max(each), max(each), **span, **({} if scale is None else {"scale": scale}))
    assert isinstance(out, torch.Tensor)
    by_row: torch.Tensor = out.unflatten(0, (rows, length))
    return by_row
