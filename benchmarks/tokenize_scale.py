"""A large .jsonl: tokenised and trained from, with peak memory; beside `datasets.map`, same tokenizer and cores.

    python benchmarks/tokenize_scale.py [--megabytes 1000] [--workers 2] [--steps 5] [--folder tokenize-scale]

Every side is a process of its own, and its memory the sum over it and its children of what is theirs in proportion
(PSS), sampled five times a second, page cache of mapped files that they touched included. "Above the model" is against
the same recipe on one megabyte. `datasets` is the package of that name; its loading of the file is shown apart.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

MAP = """
import json, sys, time
from datasets import disable_progress_bars, load_dataset
from transformers import AutoTokenizer
disable_progress_bars()
file, tokenizer, workers, cache = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
started = time.perf_counter()
data = load_dataset("json", data_files=file, split="train", cache_dir=cache)
loaded = time.perf_counter()
settings = {"add_special_tokens": False, "return_attention_mask": False}
data = data.map(
    lambda rows: {"input_ids": tokenizer(rows["text"], verbose=False, **settings)["input_ids"]},
    batched=True, num_proc=int(workers), remove_columns=["text"],
)
mapped = time.perf_counter()
print(json.dumps({"load_s": loaded - started, "map_s": mapped - loaded, "documents": len(data)}))
"""
TOKENS = """
import json, sys, time
from pathlib import Path
from frostline.data import Tally
from frostline.data.token_files import tokenised
from frostline.model import load_tokenizer
from frostline.recipe import DataSpec
file, tokenizer, workers, cache = sys.argv[1:]
tokenizer, spec = load_tokenizer(tokenizer), DataSpec(train=(file,))
started = time.perf_counter()
store = tokenised(
    spec, spec.train, tokenizer, n_vocabulary=8192, cache=Path(cache), workers=int(workers), tally=Tally()
)
print(json.dumps({
    "tokenise_s": time.perf_counter() - started, "documents": store.n_documents, "tokens": len(store.tokens)
}))
"""


def write_text(path: Path, megabytes: int) -> None:
    """Documents of words whose use falls off as words' use does, lognormal lengths, about a kilobyte each."""
    generator = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    chances = np.arange(26, 0, -1) / sum(range(27))
    words = np.array(
        ["".join(generator.choice(letters, size, p=chances)) for size in generator.integers(1, 12, 30_000)]
    )
    use = 1 / np.arange(1, len(words) + 1)
    use /= use.sum()
    with path.open("w", encoding="utf-8") as file:
        written = 0
        while written < megabytes * 1_000_000:
            sizes = np.clip(np.exp(generator.normal(4.8, 0.8, 2000)), 5, 5000).astype(int)
            drawn = words[generator.choice(len(words), int(sizes.sum()), p=use)]
            at = 0
            for size in sizes:
                written += file.write(json.dumps({"text": " ".join(drawn[at : at + size])}) + "\n")
                at += size


def prepare(folder: Path, megabytes: int) -> tuple[Path, Path, Path]:
    """(large file, small file, model folder with its tokenizer); made once."""
    from frostline.data import Document, train_byte_bpe
    from frostline.model import load_model, save_model
    from frostline.recipe import ScratchModel

    folder.mkdir(parents=True, exist_ok=True)
    large, small, model = folder / f"{megabytes}.jsonl", folder / "1.jsonl", folder / "model"
    if not small.exists():
        write_text(small, 1)
    if not large.exists():
        write_text(large, megabytes)
    if not model.exists():
        texts = [json.loads(line)["text"] for line in small.read_text(encoding="utf-8").splitlines()]
        tokenizer = train_byte_bpe([Document(t, "small") for t in texts], n_vocabulary=8192)
        sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
        spec = ScratchModel(architecture="llama", vocab_size=8192, max_position_embeddings=512, **sizes)
        save_model(load_model(spec), tokenizer, model)
    return large, small, model


def measured(command: list[str]) -> tuple[str, float, int]:
    """(output, CPU seconds of all, the most bytes that the process and its children held)."""
    before, most = _cpu_s(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        most = max(most, sum(map(_pss, _family(process.pid))))
        time.sleep(0.2)
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode:
        sys.exit(f"{command}: exit code {process.returncode}")
    return output, _cpu_s() - before, most


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _family(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [p for child in task.read_text().split() for p in _family(int(child))]
        except OSError:
            continue
    return found


def _pss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def train(file: Path, model: Path, out: Path, cache: Path, workers: int, steps: int) -> tuple[float, int]:
    """A run from the command line: (seconds, peak bytes)."""
    recipe = out.with_suffix(".yaml")
    data = {"train": str(file), "length": 512, "batch": 4, "cache": str(cache), "workers": workers}
    stages = [{"learn": "ffn", "steps": steps, "lr": 1e-4}]
    recipe.write_text(json.dumps({"model": str(model), "data": data, "stages": stages}), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("frostline")), "train", str(recipe), "--out", str(out), "--json"]
    started = time.perf_counter()
    _, _, most = measured(command)
    return time.perf_counter() - started, most


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("tokenize-scale"))
    given = parser.parse_args()
    large, small, model = prepare(given.folder, given.megabytes)
    run = given.folder / f"run-{os.getpid()}"
    run.mkdir()
    _, base = train(small, model, run / "small", run / "cache", given.workers, given.steps)
    seconds, most = train(large, model, run / "large", run / "cache", given.workers, given.steps)
    arguments = [str(large), str(model), str(given.workers)]
    ours, our_cpu, our_bytes = measured([sys.executable, "-c", TOKENS, *arguments, str(run / "tokens")])
    theirs, their_cpu, their_bytes = measured([sys.executable, "-c", MAP, *arguments, str(run / "datasets")])
    mine, other = json.loads(ours), json.loads(theirs)
    megabytes = large.stat().st_size / 1e6
    print(
        json.dumps(
            {
                "megabytes": round(megabytes),
                "train_and_tokenise_s": round(seconds, 1),
                "peak_bytes": most,
                "peak_bytes_of_1_MB": base,
                "above_the_model_bytes": most - base,
                "tokenise": {
                    **mine,
                    "cpu_s": our_cpu,
                    "peak_bytes": our_bytes,
                    "MB_per_s": megabytes / mine["tokenise_s"],
                },
                "datasets": {
                    **other,
                    "cpu_s": their_cpu,
                    "peak_bytes": their_bytes,
                    "map_MB_per_s": megabytes / other["map_s"],
                },
                "over_map": other["map_s"] / mine["tokenise_s"],
                "over_load_and_map": (other["load_s"] + other["map_s"]) / mine["tokenise_s"],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
