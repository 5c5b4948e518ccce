"""Whether a model keeps the documents of a row apart, measured on a tiny model of its kind. Read `keep_apart` first.

Positions, masks, recurrent states and caches all may carry one document into the next; no list of model types says
which do. Here rows of several documents are computed beside each document alone: what differs is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from frostline.anatomy import tiny_model
from frostline.data import Documents, Kept, model_inputs
from frostline.engine.documents import use_document_attention
from frostline.errors import AnatomyError, ModelError, in_one_line

TOLERANCE = 1e-5
"""Largest difference of a logit, relative to the largest one: what rounding makes is below 1e-6."""
LENGTHS = ((11, 1, 23, 5), (17, 14, 3))
"""Documents of two rows of 40 tokens, the second with padding; longer and shorter than tiny windows and chunks."""
ROW = 40


def keep_apart(config: Any, wanted: Kept | None = None) -> Kept:
    """How a model of this kind keeps documents of one row apart: as `wanted`, else by calls, else by a mask.

    Raises `ModelError` with what was measured where it does not.
    """
    found: list[str] = []
    for kept in (wanted,) if wanted else ("calls", "mask"):
        why = why_not(config, kept)
        if why is None:
            return kept
        found.append(f"{kept}: {why}")
    raise ModelError(
        f"{config.model_type} does not keep documents of one row apart ({'; '.join(found)}).\n"
        "  Use `data: {layout: padded}` (a row for each document), or `stream`, where a row is one text."
    )


def why_not(config: Any, kept: Kept) -> str | None:
    """Why rows of several documents would not be computed as each document alone; None where they are."""
    try:
        model = tiny_model(config)
    except AnatomyError as error:
        return str(error)
    _make_branches_matter(model)
    ids = _ids(model)
    try:
        with torch.no_grad(), _quiet():
            alone = [[_logits(model, ids[row : row + 1, a:b], None)[0] for a, b in spans] for row, spans in _spans()]
            mixed = _logits(model, ids, None)
            if kept == "calls":
                use_document_attention(model)
            packed = _logits(model, ids, Documents(LENGTHS, kept))
    except Exception as error:  # models raise anything when they are given what they do not know
        return in_one_line(error)
    off, without = _difference(packed, alone), _difference(mixed, alone)
    if without < 10 * TOLERANCE:
        return f"the probe sees nothing: even without it logits differ by {without:.1g} only"
    if not off <= TOLERANCE:
        return f"logits differ by {off:.1g} of the largest from those of each document alone"
    return None


def padding_changes(config: Any) -> str | None:
    """Why padding at the end of a row would change what comes before it; None where it does not."""
    try:
        model = tiny_model(config)
    except AnatomyError as error:
        return str(error)
    _make_branches_matter(model)
    ids, (first, second) = _ids(model), (ROW, LENGTHS[1][0])
    mask = torch.ones_like(ids)
    mask[1, second:] = 0
    try:
        with torch.no_grad(), _quiet():
            alone = [_logits(model, ids[row : row + 1, :n], None)[0] for row, n in ((0, first), (1, second))]
            padded = model(**model_inputs(ids, None, mask), use_cache=False).logits
    except Exception as error:  # models raise anything when they are given what they do not know
        return in_one_line(error)
    off = max(_relative(padded[row, : len(one)], one) for row, one in enumerate(alone))
    return None if off <= TOLERANCE else f"logits differ by {off:.1g} of the largest from those without padding"


def _spans() -> Iterator[tuple[int, Sequence[tuple[int, int]]]]:
    documents = Documents(LENGTHS)
    for row in range(len(LENGTHS)):
        yield row, documents.spans(row)


def _ids(model: nn.Module) -> torch.Tensor:
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    return torch.randint(3, vocabulary, (len(LENGTHS), ROW), generator=torch.Generator().manual_seed(3))


def _logits(model: nn.Module, ids: torch.Tensor, documents: Documents | None) -> torch.Tensor:
    logits: torch.Tensor = model(**model_inputs(ids, documents), use_cache=False).logits
    return logits


def _difference(rows: torch.Tensor, alone: Sequence[Sequence[torch.Tensor]]) -> float:
    """The largest difference of rows of documents from each of their documents."""
    return max(
        _relative(rows[r, a:b], one) for (r, spans) in _spans() for (a, b), one in zip(spans, alone[r], strict=True)
    )


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    largest = ((found - expected).abs().max() / expected.abs().max()).item()
    return float(largest)


def _make_branches_matter(model: nn.Module) -> None:
    """Initial weights leave attention almost without effect, and a leak through it unseen."""
    model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.rand(p.shape, generator=generator))
            elif p.std() < 0.05:
                p.mul_(4.0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers says nothing of kernels that are not installed."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
