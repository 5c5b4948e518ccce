"""How fast conversations become tokens with masks: `python benchmarks/conversations.py`.

Conversations of six turns of random words, a small byte-level tokenizer, a ChatML template without generation marks.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path

from frostline.data import Document, read_examples, train_byte_bpe
from frostline.recipe import DataSpec

WORDS = ["the", "cold", "river", "runs", "under", "a", "frost", "line", "and", "stone", "lies", "over", "it"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
N = 2000


def main() -> None:
    """Write conversations, read them, say how long that took."""
    draw = random.Random(0)
    turns = [("user", 40), ("assistant", 120)] * 3
    rows = [
        {"messages": [{"role": r, "content": " ".join(draw.choices(WORDS, k=n))} for r, n in turns]} for _ in range(N)
    ]
    texts = [Document(" ".join(draw.choices(WORDS, k=2000)), "words")]
    tokenizer = train_byte_bpe(texts, n_vocabulary=1000, special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = TEMPLATE
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chat.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        size = file.stat().st_size
        spec = DataSpec(train=(str(file),))
        next(read_examples(spec, spec.train, tokenizer, n_vocabulary=1000))  # the templates' process starts
        start = time.perf_counter()
        n_tokens = sum(len(e.ids) for e in read_examples(spec, spec.train, tokenizer, n_vocabulary=1000))
        took = time.perf_counter() - start
    print(f"{N} conversations, {size / 1e6:.1f} MB, {n_tokens} tokens in {took:.1f} s:")
    print(f"{N / took:.0f} conversations, {size / took / 1e6:.2f} MB, {n_tokens / took:.0f} tokens per second")


if __name__ == "__main__":
    main()
