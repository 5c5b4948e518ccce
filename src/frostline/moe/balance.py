"""Balancing losses of routers: the load-balancing loss of Switch and the router z-loss, per layer.

For one layer with N experts, over the T tokens of a step that count as targets:

    balance = N · Σ_e f_e · P_e        f_e: share of the choices that went to expert e (no gradient)
                                       P_e: mean over tokens of softmax(logits)_e
    z       = mean over tokens of logsumexp(logits)²

Balanced, the first is 1; with everything on one expert, N (Fedus et al. 2021, eq. 4). At zero logits the second is
(ln N)² (Zoph et al. 2022, eq. 5). P is the softmax of the logits also where a model scores by sigmoid.

Both are means over tokens, so given the f of the whole step they are sums over its micro-batches, and gradients do not
depend on how the step is divided. Functions here therefore return *sums* over tokens. Read `balance_sums` first.
"""

from __future__ import annotations

import torch


def load_of(index: torch.Tensor, counts: torch.Tensor, n: int) -> torch.Tensor:
    """Choices that went to each of `n` experts; shape (n,), fp64.

    `index`: (tokens, chosen), the experts of each token. `counts`: (tokens,), 1 for tokens that count, else 0.
    """
    weights = counts.to(torch.float64)[:, None].expand(-1, index.shape[1]).reshape(-1)
    zeros = torch.zeros(n, dtype=torch.float64, device=index.device)
    return zeros.index_add(0, index.reshape(-1), weights)


def shares(load: torch.Tensor) -> torch.Tensor:
    """Load → its shares, which sum to 1; zeros where nothing was routed."""
    return load / load.sum(-1, keepdim=True).clamp(min=1)


def balance_sums(logits: torch.Tensor, share: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(balance, z), each summed over the tokens that count; shape (), divide by their number for the losses.

    `logits`: (tokens, experts). `share`: f of the step, (experts,), or of each token's own row, (tokens, experts).
    `counts`: (tokens,), 1 for tokens that count, else 0.
    """
    counts = counts.to(logits.dtype)
    balance_T = (torch.softmax(logits, dim=-1) * share.detach().to(logits.dtype)).sum(-1) * logits.shape[-1]
    z_T = torch.logsumexp(logits, dim=-1).square()
    return (balance_T * counts).sum(), (z_T * counts).sum()
