"""ms-swift by its own `SwiftSft`: `tuner_type: full`, `freeze_parameters_ratio: 1`, `trainable_parameters_regex`.
Settings: any of its arguments. Without settings its defaults, gradient checkpointing (reentrant, with inputs that ask
for gradients, so that the backward pass goes through every layer) among them, apart from what makes every system
compute the same.

Changed for that: a constant rate, no decay (its own is 0.1), `adam_beta2` 0.999 (its own is 0.95), one batch a step
(its own is 16 examples), rows in order, batch size, fp32 weights, `bf16` as the job says and no `fp16` (its own for
fp32 weights). `padding_free` and `packing` ask for flash attention, which CPUs do not have. Patch: a subclass hands it
tokens in place of the data set that it would have read.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from hugging import Watch, documents, with_tokenizer
from job import Job, Meter, Result, main

REGEXES = {
    "ffn": r"\.mlp\.",
    "attn": r"\.self_attn\.",
    "experts": r"\.mlp\.(experts|gate)\.",
    "head": r"^lm_head\.",
}


def freezing(learn: str, n_layers: int) -> dict[str, Any]:
    """The job as ms-swift says it."""
    if learn == "all":
        return {}
    if learn.startswith("last-"):
        last = "|".join(str(i) for i in range(n_layers - int(learn[5:]), n_layers))
        regex = rf"\.layers\.({last})\."
    elif learn in REGEXES:
        regex = REGEXES[learn]
    else:
        raise ValueError(f"{learn!r} has no regular expression here")
    return {"freeze_parameters_ratio": 1.0, "trainable_parameters_regex": regex}


def run(job: Job) -> Result:
    """Train."""
    from datasets import Dataset
    from swift.arguments import SftArguments
    from swift.callbacks import callbacks_map
    from swift.pipelines import SwiftSft
    from transformers import AutoConfig

    class Given(SwiftSft):  # type: ignore[misc]
        """Takes tokens. Nothing predicts a document's first token."""

        def _prepare_dataset(self) -> tuple[Any, None]:
            rows = [{"input_ids": r, "labels": [-100, *r[1:]], "length": len(r)} for r in documents(job)]
            return Dataset.from_list(rows), None

    meter = Meter(job)
    config = AutoConfig.from_pretrained(job.model)
    with tempfile.TemporaryDirectory() as temporary, Watch(meter, job) as watch:
        folder = Path(temporary)
        (folder / "model").mkdir()
        callbacks_map["watch"] = lambda _args, _trainer: watch
        arguments = {
            "model": str(with_tokenizer(job, folder / "model")),
            "model_type": config.model_type,
            "template": "dummy",
            "torch_dtype": "float32",
            "tuner_type": "full",
            **freezing(job.learn, config.num_hidden_layers),
            "dataset": ["given as tokens"],
            "output_dir": str(folder / "out"),
            "per_device_train_batch_size": job.batch,
            "gradient_accumulation_steps": 1,
            "num_train_epochs": 1,
            "learning_rate": job.lr,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "adam_beta2": 0.999,
            "train_dataloader_shuffle": False,
            "bf16": job.dtype == "bf16",
            "fp16": False,
            "use_cpu": job.device == "cpu",
            "callbacks": ["watch"],
            "check_model": False,
            "save_strategy": "no",
            "report_to": ["none"],
            "disable_tqdm": True,
        }
        Given(SftArguments(**{**arguments, **job.settings})).main()
    return watch.result()


if __name__ == "__main__":
    main(run)
