"""Which experts of a model a text uses: `frostline experts` is `experts_on`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

import torch

from frostline.anatomy import Anatomy, read_anatomy
from frostline.data import Rows, read_examples
from frostline.errors import DataError, ModelError
from frostline.model import load_model, load_tokenizer
from frostline.moe import SiteHistory, Usage, histories, measure_usage, read_esft, scores_of
from frostline.recipe import DataSpec
from frostline.run_folder import RunFolder, checkpoint_of, damaged_records
from frostline.selection import needs, plain


def experts_on(
    model: str,
    data: Iterable[str | Path],
    *,
    length: int = 256,
    rows: int = 8,
    n_tokens: int = 131_072,
    settings: DataSpec | None = None,
    trust_remote_code: bool = False,
) -> Usage:
    """Where the routers of `model` (folder, hub name or run folder) send the first `n_tokens` tokens of text files.

    `length`: tokens per row; `rows`: rows per forward pass. `settings`: how the files are read (format, columns, chat
    template); what it trains on and in what rows does not matter. Raises `ModelError` for a model without experts and
    `DataError` for text that cannot be read or is shorter than a row.
    """
    source, files = checkpoint_of(model), list(data)
    loaded = load_model(source, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    n_vocabulary = loaded.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    examples = read_examples(settings or DataSpec(train=("any",)), files, tokenizer, n_vocabulary=n_vocabulary)
    ids = list(islice(chain.from_iterable(e.ids for e in examples), max(n_tokens, length) + 1))
    text = Rows(torch.tensor(ids, dtype=torch.int32), length)
    n = min(len(text), max(n_tokens // length, 1))
    if not n:
        raise DataError(f"too little text: {', '.join(map(str, files))} gives less than one row of {length} tokens")
    batches = (text.batch(range(at, min(at + rows, n))).input_ids for at in range(0, n, rows))
    return measure_usage(loaded, read_anatomy(loaded), batches)


def experts_of_run(run: str | Path) -> tuple[SiteHistory, ...]:
    """How a run's tokens were spread over its experts while it trained, layer by layer.

    Raises `RunFolderError` for what is no run folder and `ModelError` for a run that did not write it down.
    """
    folder = RunFolder.open(run)
    with damaged_records(folder.path):
        found = histories(folder.read_lines(folder.load))
    if not found:
        raise ModelError(
            f"{run} has no load of experts: it is written down where a stage of a mixture has `moe`; "
            "give a text to measure (--data)"
        )
    return found


def plain_in(
    model: str,
    anatomy: Anatomy,
    *expressions: str | None,
    data: Iterable[str | Path] | None = None,
    length: int = 256,
    settings: DataSpec | None = None,
    trust_remote_code: bool = False,
) -> dict[str, str]:
    """Selections as plain ones: experts ranked by what `model` uses on the text files `data`, ESFT's files read.

    Without `data` a ranking stays as it is, and cannot be resolved. Raises a `FrostlineError`.
    """
    given = [e for e in expressions if e is not None]
    wanted = {e: needs(e) for e in given}
    files = {path: read_esft(path, anatomy) for n in wanted.values() for path in n.files}
    if data is not None and not any(n.scores for n in wanted.values()):
        raise ModelError("--data measures which experts a text uses, but nothing is ranked: experts[top 4 by tokens]")
    scores = None
    if data is not None:
        usage = experts_on(model, data, length=length, settings=settings, trust_remote_code=trust_remote_code)
        scores = scores_of(usage)
    return {e: plain(anatomy, e, scores=scores, files=files) for e in given}
