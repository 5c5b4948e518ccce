"""Which model and which tokenizer a recipe trains."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.types import Strict

from frostline.recipe.base import Record


class ScratchModel(Record):
    """A model built from a configuration, with random weights; further keys go to the architecture's config."""

    model_config = ConfigDict(extra="allow")

    architecture: str
    """A model type of transformers, such as `llama` or `gpt2`."""

    @property
    def config_fields(self) -> dict[str, Any]:
        """The keys beside `architecture`: fields of the architecture's config class."""
        return dict(self.__pydantic_extra__ or {})


class TrainedTokenizer(Record):
    """A tokenizer trained on the training text before the run."""

    train: Literal["byte-bpe"]
    """The kind: byte-level byte-pair encoding."""
    vocab_size: Annotated[int, Field(ge=257, le=2**31 - 1)] | None = None
    """Entries; the model's own `vocab_size` when left out."""
    special_tokens: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Strict(False)] = ()
    """Control tokens for a chat template: `["<|im_start|>", "<|im_end|>"]`."""
