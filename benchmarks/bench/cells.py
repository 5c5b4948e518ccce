"""What is measured: a job on a model, over rows of certain lengths, in a precision. Read `Cell`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOBS = ("all", "ffn", "attn", "last-4", "last-2", "last-1", "head")
WIDE = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 1024,
        "tie_word_embeddings": False}  # fmt: skip
LLAMA = {"model_type": "llama", "intermediate_size": 1408, "num_hidden_layers": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama-8k": {**LLAMA, "vocab_size": 8192},
    "llama-32k": {**LLAMA, "vocab_size": 32000},
    "mixtral-8k": {"model_type": "mixtral", "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 8192,
                   "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe-8k": {"model_type": "qwen3_moe", "moe_intermediate_size": 192, "num_hidden_layers": 4,
                     "vocab_size": 8192, "num_experts": 32, "num_experts_per_tok": 4, "head_dim": 64},
}  # fmt: skip
"""Name → fields of its configuration: Llamas of 34 and 58 M parameters, mixtures of 8 and of 32 experts a layer."""
MEDIAN, P95, LIMIT = 90, 450, 1024
"""Tokens of instruction-like documents, lognormal."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the benchmark's table."""

    learn: str
    """See `job.learns`."""
    model: str
    """One of `MODELS`."""
    lengths: str = "512"
    """Tokens of every row; or `instructions`: documents of different lengths."""
    dtype: str = "fp32"

    def __str__(self) -> str:
        return f"{self.learn} {self.model} {self.lengths} {self.dtype}"

    @classmethod
    def parse(cls, text: str) -> Cell:
        """The cell that `str` wrote; trailing words may be left out. Raises `ValueError`."""
        words = text.split()
        if not 2 <= len(words) <= 4 or words[1] not in MODELS:
            raise ValueError(f"{text!r} is no cell: job, model ({', '.join(MODELS)}), lengths, precision")
        return cls(**dict(zip(("learn", "model", "lengths", "dtype"), words, strict=False)))

    @property
    def fixed(self) -> bool:
        """Whether every row has the same length."""
        return self.lengths != "instructions"


CORE = [
    Cell(learn="ffn", model="llama-8k"),
    Cell(learn="ffn", model="llama-32k"),
    Cell(learn="ffn", model="llama-8k", dtype="bf16"),
    Cell(learn="ffn", model="llama-8k", lengths="instructions"),
    Cell(learn="last-4", model="llama-8k"),
    Cell(learn="last-2", model="llama-8k"),
    Cell(learn="last-1", model="llama-8k"),
    Cell(learn="head", model="llama-8k"),
    Cell(learn="attn", model="llama-8k"),
    Cell(learn="all", model="llama-8k"),
    Cell(learn="experts", model="mixtral-8k"),
    Cell(learn="experts", model="qwen3_moe-8k"),
]
"""The twelve that `make bench` measures."""


def all_cells() -> Iterator[Cell]:
    """The core first, then every other one."""
    yield from CORE
    dense = [(job, model) for model in ("llama-8k", "llama-32k") for job in JOBS]
    mixed = [(job, model) for model in ("mixtral-8k", "qwen3_moe-8k") for job in ("experts", "all")]
    for lengths in ("512", "instructions"):
        for dtype in ("fp32", "bf16"):
            for job, model in dense + mixed:
                cell = Cell(learn=job, model=model, lengths=lengths, dtype=dtype)
                if cell not in CORE:
                    yield cell


def workload(cell: Cell, work: Path, *, rows: int, sizes: Mapping[str, Any]) -> tuple[str, str]:
    """The folder of the weights and the file of the tokens; random, from a seed; made when they are not there."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**WIDE, **MODELS[cell.model], **sizes}
    tag = "".join(f"-{n}={v}" for n, v in sorted(sizes.items()))
    model, tokens = work / f"{cell.model}{tag}", work / f"{fields['vocab_size']}-{rows}x{cell.lengths}.pt"
    if not (model / "config.json").exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32).save_pretrained(model)
    if not tokens.exists():
        torch.manual_seed(0)
        if cell.fixed:
            torch.save(torch.randint(fields["vocab_size"], (rows, int(cell.lengths))), tokens)
        else:
            spread = torch.log(torch.tensor(P95 / MEDIAN)) / 1.645
            drawn = (MEDIAN * torch.exp(spread * torch.randn(rows))).clamp(2, LIMIT).long()
            torch.save([torch.randint(fields["vocab_size"], (int(n),)) for n in drawn], tokens)
    return str(model), str(tokens)
