"""Tiny dense models that can be upcycled, saved as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from all_types import small_config
from torch import nn
from transformers import AutoModelForCausalLM

from frostline.model_source import quiet_transformers


def save_dense(model_type: str, folder: Path, *, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A folder with a tiny model whose every parameter is random, norms and biases too."""
    config = small_config(model_type)
    for name, value in fields.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    with quiet_transformers():
        model: nn.Module = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        model.to(dtype).save_pretrained(folder)
    return folder


def save_llama(folder: Path, **fields: Any) -> Path:
    """A folder with the tests' own tiny Llama and a tokenizer."""
    from frostline.data import read_documents, train_byte_bpe
    from frostline.model import save_model

    folder.parent.mkdir(parents=True, exist_ok=True)
    text = tiny.write_text(folder.parent / "corpus.txt")
    save_model(
        tiny.model("llama", **fields), train_byte_bpe(read_documents([text]), n_vocabulary=tiny.VOCABULARY), folder
    )
    return folder
