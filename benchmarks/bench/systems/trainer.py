"""Hugging Face Trainer. Settings: any of its arguments, such as `torch_compile`; without any, its defaults, apart from
what makes every system compute the same: a constant rate, no decay, the same order of rows."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from job import Job, Meter, Result, collate, load_model, main, tokens_of


def run(job: Job) -> Result:
    """Train."""
    import torch
    from torch.utils.data import Dataset, SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    meter = Meter(job)
    model = load_model(job)
    rows = torch.load(job.tokens)
    order = job.order(len(rows))
    losses: list[torch.Tensor] = []

    class Ordered(Dataset):  # type: ignore[type-arg]
        """The rows of every step, one after another."""

        def __init__(self) -> None:
            self.flat = [i for indices in order for i in indices]

        def __len__(self) -> int:
            return len(self.flat)

        def __getitem__(self, at: int) -> int:
            return self.flat[at]

    class InOrder(Trainer):  # type: ignore[misc]
        """Takes the rows as they come, and keeps the losses."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            out = super().compute_loss(*args, **kwargs)
            losses.append((out[0] if isinstance(out, tuple) else out).detach())
            return out

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Ticks."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.tick()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=job.batch,
            num_train_epochs=1,
            learning_rate=job.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=job.device == "cpu",
            bf16=job.dtype == "bf16",
            remove_unused_columns=False,
            **job.settings,
        )
        InOrder(
            model=model,
            args=arguments,
            train_dataset=Ordered(),
            data_collator=lambda indices: collate(rows, indices),
            callbacks=[Clock()],
        ).train()
    return Result(
        seconds=meter.seconds,
        losses=[x.item() for x in losses],
        peak_bytes=meter.peak_bytes(),
        tokens=tokens_of(rows, order),
        cpu_seconds=meter.cpu_seconds,
        n_learning=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


if __name__ == "__main__":
    main(run)
