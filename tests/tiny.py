"""Tiny models, texts and recipes that tests share. Everything is made here; nothing is downloaded."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frostline.anatomy import Anatomy, read_anatomy
from frostline.model import load_skeleton
from frostline.recipe import Recipe, ScratchModel, recipe_from_dict

VOCABULARY = 320
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL | {"head_dim": 8},
    "mistral": SMALL | {"head_dim": 8},
    "gemma": SMALL | {"head_dim": 8},
    "gpt2": GPT2,
    "mixtral": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": SMALL,
}
"""Architecture → configuration of a tiny model of it."""

PACKED: dict[str, dict[str, Any]] = {
    "gpt_neox": {n: v for n, v in SMALL.items() if n != "num_key_value_heads"},
    "gpt_oss": SMALL | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}
"""The same, of models that pack their tensors in other ways: head by head, gate and up interleaved."""

WORDS = ("frost", "line", "river", "stone", "light", "under", "over", "and", "the", "cold", "warm", "north", "south")


def config(architecture: str, **fields: Any) -> dict[str, Any]:
    """The `model` section of a recipe for a tiny model."""
    return {"architecture": architecture, **(FAMILIES | PACKED)[architecture], **fields}


@lru_cache(maxsize=32)
def anatomy(architecture: str) -> Anatomy:
    """The anatomy of a tiny model."""
    return read_anatomy(load_skeleton(ScratchModel(**config(architecture))))


def model(architecture: str, *, seed: int = 0, **fields: Any) -> nn.Module:
    """A tiny model with random weights."""
    from frostline.model import load_model

    return load_model(ScratchModel(**config(architecture, **fields)), seed=seed)


def write_text(path: Path, *, n_words: int = 3000, seed: int = 0) -> Path:
    """A text of random words that a tiny model can learn something from."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(WORDS), (n_words,), generator=generator).tolist()
    path.write_text(" ".join(WORDS[i] for i in chosen), encoding="utf-8")
    return path


def recipe_dict(folder: Path, architecture: str = "llama", **overrides: Any) -> dict[str, Any]:
    """A recipe of two short stages, as plain data; its text is written into `folder`."""
    text = write_text(folder / "text.txt")
    return {
        "model": config(architecture),
        "data": {"train": str(text), "length": 32, "batch": 4},
        "stages": [
            {"name": "joint", "learn": "all", "steps": 3, "lr": 3e-3},
            {"name": "ffn", "learn": "ffn", "steps": 3, "lr": 3e-3},
        ],
        "eval": {"batches": 2},
        "evidence": {"gradients_every": 2},
        "device": "cpu",
        **overrides,
    }


def recipe(folder: Path, architecture: str = "llama", **overrides: Any) -> Recipe:
    """The recipe of `recipe_dict`."""
    return recipe_from_dict(recipe_dict(folder, architecture, **overrides))
