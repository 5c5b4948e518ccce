"""Text that a run's model continues a prompt with: before the first stage and after each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from frostline.audit import rewind
from frostline.generate import continue_text
from frostline.model import load_model, load_tokenizer
from frostline.run_folder import RunFolder

TEMPERATURE = 0.7


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One prompt continued at one moment of a run."""

    when: str
    """`before training`, or `after stage …`."""
    prompt: str
    text: str
    """The continuation, without the prompt."""


def sample_run(run: RunFolder, prompts: Sequence[str], *, n_tokens: int = 60) -> list[Sample]:
    """Continuations of every prompt before training and after each finished stage, in this order (sampled, seed 0)."""
    stages = run.read_schedule()[: len(run.read_boundaries()) - 1]
    model, tokenizer = load_model(str(run.model)), load_tokenizer(str(run.model))
    found: list[list[Sample]] = []
    for boundary in range(len(stages), -1, -1):
        if boundary < len(stages):
            rewind(model, run, boundary)
        when = f"after stage {stages[boundary - 1].name}" if boundary else "before training"
        texts = [continue_text(model, tokenizer, p, n_tokens=n_tokens, temperature=TEMPERATURE) for p in prompts]
        found.append([Sample(when=when, prompt=p, text=t.removeprefix(p)) for p, t in zip(prompts, texts, strict=True)])
    return [sample for samples in reversed(found) for sample in samples]


def samples_to_json(samples: Sequence[Sample]) -> dict[str, Any]:
    """The samples as plain data."""
    return {"samples": [asdict(s) for s in samples]}
