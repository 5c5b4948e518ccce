"""What the peers built on Hugging Face's Trainer share: rows in the job's order, a clock, the loss of every step.

Nothing here changes what a peer computes. Read `Watch`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from job import Job, Meter, Result, tokens_of
from transformers import Trainer, TrainerCallback


def documents(job: Job) -> list[list[int]]:
    """The tokens of every row, one step's after another's: a peer that takes them as they come keeps the order."""
    import torch

    rows = list(torch.load(job.tokens))
    return [rows[i].tolist() for indices in job.order(len(rows)) for i in indices]


def alike(rows: list[list[int]]) -> bool:
    """Whether all rows are of one length, so that no system pads."""
    return len({len(row) for row in rows}) == 1


def tokenizer(vocabulary: int) -> Any:
    """Peers want one, for the token that pads; the rows are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "t0")), unk_token="t0", pad_token="t0", eos_token="t1"
    )


def with_tokenizer(job: Job, folder: Path) -> Path:
    """The job's model in a folder that has a tokenizer too, as peers that load by path expect."""
    for file in Path(job.model).iterdir():
        (folder / file.name).symlink_to(file.resolve())
    tokenizer(json.loads((folder / "config.json").read_text())["vocab_size"]).save_pretrained(folder)
    return folder


class Watch(TrainerCallback):  # type: ignore[misc]
    """A callback that is the clock. Inside `with` it keeps the loss of every step as well; the patch for that:
    `Trainer.training_step`, in which every peer here ends up, also hands on what it returns."""

    def __init__(self, meter: Meter, job: Job) -> None:
        import torch

        rows = torch.load(job.tokens)
        self.meter, self.tokens = meter, tokens_of(rows, job.order(len(rows)))
        self.losses: list[Any] = []
        self.n_learning = self.peak_bytes = 0
        self.recomputes = False

    def __enter__(self) -> Watch:
        self.original = original = Trainer.training_step

        def training_step(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
            loss = original(trainer, *args, **kwargs)
            self.losses.append(loss.detach())
            return loss

        Trainer.training_step = training_step
        return self

    def __exit__(self, *_: object) -> None:
        Trainer.training_step = self.original

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        """The first step begins."""
        self.n_learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        self.meter.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step has ended."""
        self.meter.tick()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Before a peer saves the model, as some do."""
        self.peak_bytes = self.meter.peak_bytes()

    def result(self) -> Result:
        """What the system did."""
        return Result(
            seconds=self.meter.seconds,
            losses=[x.item() for x in self.losses],
            peak_bytes=self.peak_bytes,
            cpu_seconds=self.meter.cpu_seconds,
            n_learning=self.n_learning,
            tokens=self.tokens,
            notes={"gradient_checkpointing": self.recomputes},
        )
