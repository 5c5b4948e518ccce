"""LLaMA-Factory by its own `run_exp`: stage `sft`, `finetuning_type: freeze` (`full` for the job `all`). Settings: any
of its arguments; `neat_packing` holds only where rows differ in length. Without settings its defaults, gradient
checkpointing of the layers that learn (reentrant, its own) among them, apart from what makes every system compute the
same.

Changed for that: a constant rate, no decay, rows in order (`disable_shuffling`), batch size, `bf16` as the job says. It
is given tokens (`tokenized_path`), so its reading of text takes no part. It pads to a multiple of 8. With
`neat_packing` a step's documents are one row, in the format of its own packing, which would choose other documents and
pad to `cutoff_len + 1`. Patches: modules for pictures and sound that do not load beside this torch are hidden.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from absent import hide_what_does_not_load

hide_what_does_not_load("torchvision")
hide_what_does_not_load("torchaudio", stand_in=True)
from hugging import Watch, alike, documents, with_tokenizer  # noqa: E402
from job import Job, Meter, Result, main  # noqa: E402


def freezing(job: Job) -> dict[str, Any]:
    """The job as LLaMA-Factory says it. A count of 0 layers is what leaves `freeze_extra_modules` alone."""
    from transformers import AutoConfig

    n_layers = AutoConfig.from_pretrained(job.model).num_hidden_layers
    if job.learn == "all":
        return {"finetuning_type": "full"}
    modules = {"ffn": "mlp", "experts": "mlp", "attn": "self_attn"}
    if job.learn in modules:
        layers, module = n_layers, modules[job.learn]
    elif job.learn.startswith("last-"):
        layers, module = int(job.learn[5:]), "all"
    elif job.learn == "head":
        layers, module = 0, "all"
    else:
        raise ValueError(f"LLaMA-Factory's freeze has no way to say {job.learn!r}")
    out = {"finetuning_type": "freeze", "freeze_trainable_layers": layers, "freeze_trainable_modules": module}
    return {**out, "freeze_extra_modules": "lm_head"} if job.learn == "head" else out


def examples(rows: list[list[int]], per_step: int, *, packed: bool) -> list[dict[str, list[int]]]:
    """The rows as LLaMA-Factory keeps them once they are tokens. Nothing predicts a document's first token."""
    plain = [{"input_ids": row, "attention_mask": [1] * len(row), "labels": [-100, *row[1:]]} for row in rows]
    return [together(plain[i : i + per_step]) for i in range(0, len(plain), per_step)] if packed else plain


def together(documents: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    """One packed row: the mask counts its documents from 1; what fills it up to a multiple of 8 has 0."""
    row: dict[str, list[int]] = {"input_ids": [], "attention_mask": [], "labels": [], "position_ids": []}
    for number, document in enumerate(documents, start=1):
        n = len(document["input_ids"])
        row["input_ids"] += document["input_ids"]
        row["labels"] += document["labels"]
        row["attention_mask"] += [number] * n
        row["position_ids"] += range(n)
    fill = -len(row["input_ids"]) % 8
    return {key: values + [-100 if key == "labels" else 0] * fill for key, values in row.items()}


def run(job: Job) -> Result:
    """Train."""
    from datasets import Dataset, DatasetDict
    from llamafactory.train.tuner import run_exp

    meter = Meter(job)
    rows = documents(job)
    settings = dict(job.settings)
    packed = settings["neat_packing"] = settings.get("neat_packing", False) and not alike(rows)
    with tempfile.TemporaryDirectory() as temporary, Watch(meter, job) as watch:
        folder = Path(temporary)
        (folder / "model").mkdir()
        train = Dataset.from_list(examples(rows, job.batch, packed=packed))
        DatasetDict({"train": train}).save_to_disk(folder / "tokens")
        arguments = {
            "model_name_or_path": str(with_tokenizer(job, folder / "model")),
            "stage": "sft",
            "do_train": True,
            **freezing(job),
            "dataset": "given as tokens",
            "tokenized_path": str(folder / "tokens"),
            "output_dir": str(folder / "out"),
            "per_device_train_batch_size": 1 if packed else job.batch,
            "num_train_epochs": 1,
            "learning_rate": job.lr,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "disable_shuffling": True,
            "bf16": job.dtype == "bf16",
            "use_cpu": job.device == "cpu",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        run_exp({**arguments, **settings}, callbacks=[watch])
    return watch.result()


if __name__ == "__main__":
    main(run)
