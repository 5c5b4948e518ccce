"""Continuing a text with a saved model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from frostline.errors import DataError
from frostline.model import load_model, load_tokenizer
from frostline.model_source import quiet_transformers
from frostline.run_folder import checkpoint_of

LEAST_TEMPERATURE = 1e-3
"""Below it the likeliest token is taken: logits divided by less overflow."""


def generate_text(
    model: str,
    prompt: str,
    *,
    n_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> str:
    """The prompt with at most `n_tokens` tokens more. `model`: folder, hub name or run folder. Raises `ModelError`."""
    if any("\ud800" <= c <= "\udfff" for c in prompt):
        raise DataError("the prompt is not UTF-8 text")
    source = checkpoint_of(model)
    loaded = load_model(source, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    return continue_text(loaded, tokenizer, prompt, n_tokens=n_tokens, temperature=temperature, seed=seed)


def continue_text(
    model: nn.Module, tokenizer: Any, prompt: str, *, n_tokens: int, temperature: float = 0.0, seed: int = 0
) -> str:
    """The prompt with at most `n_tokens` tokens more; `temperature` 0 takes the likeliest token each time."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = [begin] * (begin is not None) + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        ids = [0]
    device = next(model.parameters()).device
    input_ids = torch.tensor([ids], dtype=torch.long, device=device)
    torch.manual_seed(seed)
    model.eval()
    if temperature < LEAST_TEMPERATURE:
        temperature = 0.0
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    with torch.no_grad(), quiet_transformers():
        out = model.generate(  # type: ignore[operator]
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=n_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            **sampling,
        )
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text
