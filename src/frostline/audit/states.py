"""The values of a run's pieces at its boundaries, found in the run's own files by their hashes.

A boundary records what every piece hashed to. Entry files and the final model hold values; a value counts for every
boundary whose recorded hash it has. So each number below is recomputed from files, and a file that was changed
after the run answers to no hash. Read `States` first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from safetensors import SafetensorError, safe_open

from frostline.anatomy import Anatomy, Slice, fingerprint, take
from frostline.errors import ModelError, RunFolderError
from frostline.run_folder import RunFolder
from frostline.weights import Weights


class States:
    """Values of pieces by hash. Every file is read and hashed once, when the object is made."""

    def __init__(self, folder: RunFolder, anatomy: Anatomy, pieces: dict[str, Slice], *, n_stages: int) -> None:
        self.folder, self.pieces = folder, pieces
        self.stored = {t.name for t in anatomy.tensors if t.persistent and t.alias_of is None}
        self._where: dict[tuple[str, str], str | int] = {}  # (piece, hash) → entry file's stage, or "model"
        self.entry_hashes: list[dict[str, str]] = []
        """Per stage: piece → hash of the value in its entry file."""
        for stage in range(n_stages):
            self.entry_hashes.append({})
            for name, value in self._entry(stage):
                self._note(name, value, stage, self.entry_hashes[stage])
        self.model_hashes: dict[str, str] = {}
        """Piece → hash of the value in the final model; empty when the run has none."""
        self._weights: Weights | None = None
        if folder.model.exists():
            try:
                self._weights = Weights(folder.model, names=self.stored)
            except ModelError:
                self._weights = None  # no weights in it: every piece then lacks a hash, and the audit says so
        if self._weights is not None:
            for name, piece in pieces.items():
                if piece.tensor in self._weights:
                    self._note(name, self._of_model(piece), "model", self.model_hashes)
        self.foreign = self._foreign(anatomy)
        """Tensors of the final model that no part accounts for, or tied ones that differ from what they are tied to."""

    def _foreign(self, anatomy: Anatomy) -> list[str]:
        if self._weights is None:
            return []
        out = []
        for name in self._weights:
            source = anatomy.ties.get(name)
            if source is not None and source in self._weights:
                if fingerprint(self._weights[name]) != fingerprint(self._weights[source]):
                    out.append(f"{name} (differs from {source})")
            elif name not in anatomy.tensor:
                out.append(name)
        return out

    def value(self, name: str, hashed: str) -> torch.Tensor | None:
        """The value of a piece with that hash; None when no file of the run holds it."""
        where = self._where.get((name, hashed))
        if where is None:
            return None
        if where == "model":
            return self._of_model(self.pieces[name])
        with safe_open(self.folder.entry(int(where)), framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def _note(self, name: str, value: torch.Tensor, where: str | int, hashes: dict[str, str]) -> None:
        hashes[name] = fingerprint(value)
        self._where.setdefault((name, hashes[name]), where)

    def _of_model(self, piece: Slice) -> torch.Tensor:
        assert self._weights is not None
        return take(self._weights[piece.tensor], piece)

    def _entry(self, stage: int) -> Iterator[tuple[str, torch.Tensor]]:
        path = self.folder.entry(stage)
        if not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise RunFolderError(f"{path} is not readable: {error}") from None
