"""Getting models in and out: a folder, a hub name or a configuration → a model and its tokenizer; a folder out.

Nothing is executed that comes with the data: pickled weights are refused, remote code needs `trust_remote_code`.
Read `load_model` and `load_skeleton` first. `Weights` reads a saved folder by the model's own tensor names.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from frostline.dtypes import set_dtype
from frostline.errors import ModelError, did_you_mean
from frostline.grouped import use_own_experts
from frostline.older import mend
from frostline.recipe import ScratchModel

Source = str | ScratchModel
"""A folder or hub name, or the configuration of a model built from scratch."""


def load_config(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a model; reads no weights. Raises `ModelError`."""
    if isinstance(source, ScratchModel):
        return _scratch_config(source)
    _check_exists(source)
    try:
        with quiet_transformers():
            if Path(source).is_file():
                return _config_of_file(Path(source))
            return AutoConfig.from_pretrained(*_place(source), **_pinned(source, trust_remote_code))
    except Exception as error:  # configuration classes raise whatever their checks raise
        raise _cannot_load("configuration", source, error) from error


def load_skeleton(source: Source, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The model's structure on the meta device: names and shapes, no weights, no memory. Raises `ModelError`.

    `dtype`: of its weights; that of its configuration when left out.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    try:
        with quiet_transformers(), torch.device("meta"):
            model = _module(AutoModelForCausalLM.from_config(config, **_code(config, source, trust_remote_code)))
            if dtype is not None:
                set_dtype(model, dtype)
            return model
    except Exception as error:  # constructors raise whatever their checks raise
        raise _cannot_load("causal language model", source, error) from error


def load_fake(
    source: Source, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> tuple[nn.Module, FakeTensorMode]:
    """The model with tensors that have shapes and no values, and the mode they live in. Raises `ModelError`."""
    config = load_config(source, trust_remote_code=trust_remote_code)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with quiet_transformers(), mode, torch.device("cpu"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, **_code(config, source, trust_remote_code)
            )
            set_dtype(model, dtype)
            return _module(model), mode
    except Exception as error:  # constructors raise whatever their checks raise
        raise _cannot_load("causal language model", source, error) from error


def load_model(
    source: Source, *, seed: int = 0, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> nn.Module:
    """The model with its weights in `dtype` on the CPU. Raises `ModelError`.

    A model from scratch gets initial weights from `seed`: drawn in fp32, whatever `dtype` they are rounded to.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    try:
        with quiet_transformers():
            if isinstance(source, ScratchModel):
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            else:
                _check_safetensors(source)
                model, info = AutoModelForCausalLM.from_pretrained(
                    *_place(source),
                    dtype=dtype,
                    use_safetensors=True,
                    output_loading_info=True,
                    **_pinned(source, trust_remote_code),
                )
                _check_complete(source, info)
            set_dtype(model, dtype)
    except Exception as error:  # constructors and loaders raise whatever their checks raise
        raise _cannot_load("model", source, error) from error
    return _module(model)


def load_random(source: Source, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> nn.Module:
    """The model on the CPU with initial weights, whatever weights exist. Raises `ModelError`."""
    config = load_config(source, trust_remote_code=trust_remote_code)
    try:
        with quiet_transformers():
            code = _code(config, source, trust_remote_code)
            model = _module(AutoModelForCausalLM.from_config(config, dtype=torch.float32, **code))
            set_dtype(model, dtype)
            return model
    except Exception as error:  # constructors raise whatever their checks raise
        raise _cannot_load("causal language model", source, error) from error


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub name. Raises `ModelError`."""
    _check_exists(source)
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(*_place(source), **_pinned(source, trust_remote_code))
    except ModelError:
        raise
    except Exception as error:  # tokenizers raise whatever their files make them raise
        raise ModelError(
            f"no tokenizer can be loaded from {source} ({_first_line(error)}).\n"
            "  Name one in the recipe (`tokenizer: FOLDER`), or train one (`tokenizer: {train: byte-bpe}`)."
        ) from None


def untie(model: nn.Module) -> bool:
    """Give a tied head weights of its own, equal to the embedding's; returns whether there was a tie to cut."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if head is None or head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(embedding.weight.detach().clone())
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    model.all_tied_weights_keys = {}  # type: ignore[assignment]
    return True


def save_model(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a folder that plain transformers loads, tokenizer included."""
    with quiet_transformers():
        model.save_pretrained(folder)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


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


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers inside: what matters is said by Frostline."""
    from transformers.utils import logging as transformers_logging

    hub = logging.getLogger("huggingface_hub")
    level, hub_level = transformers_logging.get_verbosity(), hub.level
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub.setLevel(logging.CRITICAL)  # its retries are over when the error we report is raised
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()


def _module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    mend(model)
    use_own_experts(model)
    return model


def _scratch_config(spec: ScratchModel) -> Any:
    if spec.architecture not in CONFIG_MAPPING:
        near = did_you_mean(spec.architecture, list(CONFIG_MAPPING))
        raise ModelError(f"transformers {transformers.__version__} has no architecture '{spec.architecture}'.{near}")
    config_class = CONFIG_MAPPING[spec.architecture]
    known = [f.name for f in dataclasses.fields(config_class)] + list(getattr(config_class, "attribute_map", {}))
    for field in spec.config_fields:
        if field not in known:
            near = did_you_mean(field, known)
            raise ModelError(f"model: the configuration of '{spec.architecture}' has no field '{field}'.{near}")
    try:
        with quiet_transformers():
            return config_class(**spec.config_fields)
    except Exception as error:  # config classes raise whatever their checks raise
        raise ModelError(f"model: '{spec.architecture}' refuses this configuration: {_first_line(error)}") from None


def _config_of_file(path: Path) -> Any:
    fields = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(fields, dict) or fields.get("model_type") not in CONFIG_MAPPING:
        found = fields.get("model_type") if isinstance(fields, dict) else None
        near = did_you_mean(str(found), list(CONFIG_MAPPING)) if found else ""
        raise ModelError(f"{path} is no configuration of a known architecture (model_type: {found}).{near}")
    return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)


def _place(source: str) -> tuple[str]:
    """The folder or hub name, without the commit after an `@`."""
    return (source if Path(source).exists() else source.partition("@")[0],)


def _pinned(source: str, trust_remote_code: bool) -> dict[str, Any]:
    """The commit of a hub name, and whether code that comes with the model may run. Raises `ModelError` for code from
    the hub that may be another tomorrow."""
    commit = "" if Path(source).exists() else source.partition("@")[2]
    if trust_remote_code and not Path(source).exists() and not re.fullmatch("[0-9a-f]{40}", commit):
        raise ModelError(
            f"{source}: code from a hub is run only as it is at a commit that you have looked at; write "
            f"{source.partition('@')[0]}@ and the 40 digits of the commit"
        )
    elsewhere = [name for name in _code_of(source).values() if "--" in name]
    if trust_remote_code and elsewhere:
        raise ModelError(f"{source}: its code lies in another repository ({elsewhere[0]}); copy it into the folder")
    pin = {"revision": commit} if commit else {}
    return {"trust_remote_code": trust_remote_code, **pin, **({"code_revision": commit} if commit else {})}


def _code(config: Any, source: Source, trust_remote_code: bool) -> dict[str, Any]:
    """The same for a model that is built from its configuration."""
    if isinstance(source, ScratchModel) or not trust_remote_code:
        return {"trust_remote_code": False}
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    pinned = _pinned(source, trust_remote_code)
    return {
        "trust_remote_code": True,
        **({"code_revision": pinned["revision"]} if own and "revision" in pinned else {}),
    }


def _code_of(source: str) -> dict[str, str]:
    """What code a folder's configuration asks for: class → `file.Class`; none for a hub name."""
    try:
        found = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))["auto_map"]
        return {str(k): str(v[-1] if isinstance(v, list) else v) for k, v in found.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _check_exists(source: str) -> None:
    path = Path(source)
    if path.exists():
        if path.is_dir() and not (path / "config.json").exists():
            inside = f"; the model of this run folder is {path / 'model'}" if (path / "schedule.json").exists() else ""
            raise ModelError(f"{source} is no model folder: it has no config.json{inside}")
        return
    if source.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", source):
        raise ModelError(f"no model at {source}: there is no such folder")


def _check_safetensors(source: str) -> None:
    folder = Path(source)
    if (folder / "model.safetensors.index.json").exists():
        shard_names(folder / "model.safetensors.index.json")
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = [p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))]
        if pickles:
            raise ModelError(
                f"{source} holds its weights as a pickle ({pickles[0]}), which can run any code when it is read; "
                "convert it to safetensors first"
            )
        raise ModelError(f"{source} holds no weights (*.safetensors)")


def _check_complete(source: str, info: Mapping[str, Any]) -> None:
    for kind in ("missing_keys", "mismatched_keys"):
        found = sorted(map(str, info.get(kind) or ()))
        if found:
            what = "lacks" if kind == "missing_keys" else "has other shapes for"
            raise ModelError(f"{source} {what} {len(found)} tensors of its architecture: {', '.join(found[:5])}")


def _cannot_load(what: str, source: Source, error: Exception) -> ModelError:
    if isinstance(error, ModelError):
        return error
    if "trust_remote_code" in str(error):
        files = sorted({f"{name.rpartition('.')[0]}.py" for name in _code_of(str(source)).values()})
        where = f" ({', '.join(files)})" if files else ""
        return ModelError(f"{source} comes with code of its own{where}; only `--trust-remote-code` runs it")
    name = source if isinstance(source, str) else source.architecture
    hint = "" if isinstance(source, ScratchModel) or Path(source).exists() else " It is not a folder here either."
    return ModelError(f"no {what} can be loaded from '{name}': {_first_line(error)}.{hint}")


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    plain = isinstance(error, (OSError, ValueError, RuntimeError)) and line
    return line if plain else f"{type(error).__name__}: {line}".rstrip(": ")


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
            raise ModelError(f"{file} is no readable safetensors file: {_first_line(error)}") from None
        for name in names:
            if name in out:
                raise ModelError(f"{path}: tensor {name} is in two files, {out[name].name} and {file.name}")
            out[name] = file
    return out


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names, all of them beside it. Raises `ModelError`."""
    try:
        by_name = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = list(dict.fromkeys(by_name.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is no readable index of shards: {_first_line(error)}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index} names a shard outside its folder: {name}")
    return names


def _converted_state(folder: Path) -> dict[str, torch.Tensor]:
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} has no config.json, so its tensors cannot be brought under the model's names")
    try:
        return _loaded_state(folder)
    except Exception as error:  # loaders raise whatever the files make them raise
        raise _cannot_load("model", str(folder), error) from error


def _loaded_state(folder: Path) -> dict[str, torch.Tensor]:
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
    return dict(model.state_dict())
