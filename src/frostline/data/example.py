"""Files → `Example`s: one document or conversation each, as tokens, with what counts in the loss.

Whatever lies before training begins here and nothing else does: how examples become rows and batches is not this
file's business. Read `read_examples` first; it is lazy and needs no more memory than the examples it looks at together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from frostline.data.chat import Spoken, control_tokens, spoken
from frostline.data.encoding import encode_texts
from frostline.data.files import RowError
from frostline.data.formats import Pair, TokenRow
from frostline.data.masks import Masked, Written, encode_spans
from frostline.data.messages import Conversation
from frostline.data.sources import FileTally, Found, Tally, shapes_of
from frostline.data.templates import Template, template_of
from frostline.data.text import Document
from frostline.data.tokens import check_vocabulary
from frostline.errors import DataError
from frostline.recipe import DataSpec, SourceSpec

TOGETHER = 64
"""Examples given to the tokenizer at once: enough for its threads."""


@dataclass(frozen=True, slots=True)
class Example:
    """One document or conversation, tokenised."""

    ids: np.ndarray[Any, np.dtype[np.int32]]
    """(tokens,) int32, special tokens included."""
    learns: np.ndarray[Any, np.dtype[np.bool_]]
    """(tokens,) bool: whether this token counts in the loss as a target; the first never does."""
    n_bytes: int
    """UTF-8 bytes of the text that its learning tokens stand for."""
    source: str
    """File and line, for errors and reports."""


def read_examples(
    spec: DataSpec,
    paths: Iterable[str | Path | SourceSpec],
    tokenizer: Any,
    *,
    n_vocabulary: int,
    tally: Tally | None = None,
) -> Iterator[Example]:
    """The examples of `paths`, in the order given, read as `spec` says. Raises `DataError` where one cannot be read.

    `n_vocabulary`: entries of the model's vocabulary; a token outside it is an error. `tally` is filled on the way.
    """
    found = shapes_of(spec, paths, Tally() if tally is None else tally)
    maker = Maker(spec, tokenizer, n_vocabulary)
    while some := list(islice(found, TOGETHER)):
        yield from maker.examples(some)


class Maker:
    """Shapes → examples, with one tokenizer and the templates it was asked for."""

    def __init__(self, spec: DataSpec, tokenizer: Any, n_vocabulary: int) -> None:
        self.spec, self.tokenizer, self.n_vocabulary = spec, tokenizer, n_vocabulary
        self.templates: dict[bool, Template] = {}
        self.control = control_tokens(tokenizer)
        self.any_control = re.compile("|".join(map(re.escape, self.control))) if self.control else None

    def examples(self, some: Sequence[Found]) -> Iterator[Example]:
        """Those of some shapes, in their order; what cannot be used is counted or refused."""
        made: dict[int, Example] = {}
        written: dict[int, Written] = {}
        documents: dict[int, Document] = {}
        for i, found in enumerate(some):
            match found.shape:
                case Document() as document:
                    documents[i] = document
                case TokenRow() as row:
                    made[i] = self.of_tokens(row)
                case shape:
                    with_text = self.written(shape, found)
                    written |= {i: with_text} if with_text else {}
        made |= zip(documents, self.of_documents(list(documents.values())), strict=True)
        for is_chat in (False, True):
            these = {i: w for i, w in written.items() if w.is_chat == is_chat}
            masked = encode_spans(list(these.values()), self.tokenizer, is_chat=is_chat)
            made |= {i: self.example(m, w.source) for (i, w), m in zip(these.items(), masked, strict=True)}
        for i in sorted(made):
            if made[i].learns.any() or i in documents:  # a text of one token is the continuation of the one before it
                yield made[i]
            else:
                some[i].refuse(RowError(f"{made[i].source}: nothing to learn: no token counts in the loss"))

    def written(self, shape: Pair | Conversation, found: Found) -> Written | None:
        """What is said as text, or None when it could not be used and was counted."""
        if isinstance(shape, Pair):
            return self.plain(shape.prompt, shape.completion, shape.source)
        if shape.plain is not None and self.no_template():
            return self.plain(*shape.plain, shape.source)
        try:
            template = self.template(bool(shape.tools))
            said = spoken(shape, template, loss_on=self.spec.loss_on, control=self.control)
        except RowError as error:
            found.refuse(error)
            return None
        self.count(found.tally, shape, said)
        return Written(said.text, said.spans, shape.source, is_chat=True)

    def plain(self, prompt: str, completion: str, source: str) -> Written:
        """A prompt and its completion as one text."""
        start = 0 if self.spec.loss_on == "all" else len(prompt)
        return Written(prompt + completion, ((start, len(prompt) + len(completion)),), source, is_chat=False)

    def count(self, tally: FileTally, conversation: Conversation, said: Spoken) -> None:
        """Remember what a conversation was made of and what became of it."""
        for method in said.methods:
            tally.methods[method] = tally.methods.get(method, 0) + 1
        tally.with_tools += bool(conversation.tools)
        for message in conversation.messages:
            tally.roles[message["role"]] = tally.roles.get(message["role"], 0) + 1
            content = message.get("content", "").strip()
            tally.left_out += content not in said.text
            tally.control_in_text += bool(self.any_control and self.any_control.search(content))

    def no_template(self) -> bool:
        """Whether neither recipe nor tokenizer has a chat template."""
        return self.spec.chat_template is None and not self.tokenizer.chat_template

    def template(self, tools: bool) -> Template:
        """The chat template; some tokenizers have another one for conversations with tools."""
        if tools not in self.templates:
            self.templates[tools] = template_of(
                self.tokenizer, file=self.spec.chat_template, variables=self.spec.template_args, tools=tools
            )
        return self.templates[tools]

    def of_documents(self, documents: list[Document]) -> list[Example]:
        """Plain texts: everything learns but the first token."""
        out = []
        for document, tokens in zip(documents, encode_texts([d.text for d in documents], self.tokenizer), strict=True):
            learns = np.ones(len(tokens.ids), dtype=np.bool_)
            learns[:1] = False
            n_bytes = _utf_8_bytes(document.text) - _utf_8_bytes(document.text[: tokens.first_end])
            out.append(self.example(Masked(tokens.ids, learns, n_bytes), document.source))
        return out

    def of_tokens(self, row: TokenRow) -> Example:
        """Tokens made elsewhere; the text they stand for is what the tokenizer makes of them."""
        ids = np.array(row.ids, dtype=np.int64)
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self.n_vocabulary):
            wrong = int(next(i for i in ids if not 0 <= i < self.n_vocabulary))
            raise DataError(
                f"{row.source}: input_ids holds {wrong}, but the model's vocabulary has {self.n_vocabulary} entries: "
                "the tokens were made for another model"
            )
        learns = np.array(row.learns, dtype=np.bool_)
        learns[:1] = False
        text = self.tokenizer.decode(ids[learns], skip_special_tokens=True)
        return Example(ids=ids.astype(np.int32), learns=learns, n_bytes=len(text.encode()), source=row.source)

    def example(self, masked: Masked, source: str) -> Example:
        """With its tokens checked against the model's vocabulary."""
        check_vocabulary(masked.ids, self.n_vocabulary)
        return Example(ids=masked.ids, learns=masked.learns, n_bytes=masked.n_bytes, source=source)


def _utf_8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
