"""The tensors of a saved model, read one at a time by the model's own names for them. Read `Weights`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from frostline.errors import ModelError
from frostline.model_source import loading, reason, shard_names


class Weights(Mapping[str, torch.Tensor]):
    """The tensors of a saved folder (or one `.safetensors` file), one read at a time.

    With `names`, tensors go by these names of the model's own parameters and buffers; where the saved format names
    or packs them differently, transformers converts them (the whole model is then in memory).
    """

    def __init__(self, folder: str | Path, *, names: set[str] | None = None) -> None:
        self.folder = Path(folder)
        self._files = _tensor_files(self.folder)
        self._converted: dict[str, torch.Tensor] | None = None
        if names is not None and not names <= set(self._files):
            self._converted = _converted_state(self.folder)

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._converted is not None:
            return self._converted[name]
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files if self._converted is None else self._converted)

    def __len__(self) -> int:
        return len(self._files if self._converted is None else self._converted)


def _tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name → the file that holds it: `model.safetensors` before an index, as transformers reads a folder.

    Raises `ModelError` for a shard outside the folder, a tensor in two files, and a file that cannot be read.
    """
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if path.is_file():
        files = [path]
    elif single.exists():
        files = [single]
    elif index.exists():
        files = sorted({path / name for name in shard_names(index)})
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{path} holds no weights (*.safetensors)")
    out: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
        except Exception as error:  # safetensors raises its own type for a broken header
            raise ModelError(f"{file} is no readable safetensors file: {reason(error)}") from None
        for name in names:
            if name in out:
                raise ModelError(f"{path}: tensor {name} is in two files, {out[name].name} and {file.name}")
            out[name] = file
    return out


def _converted_state(folder: Path) -> dict[str, torch.Tensor]:
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} has no config.json, so its tensors cannot be brought under the model's names")
    with loading("model", str(folder)):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
        return dict(model.state_dict())
