"""Getting models in and out: a folder, a hub name or a configuration → a model and its tokenizer; a folder out.

Nothing is executed that comes with the data: pickled weights are refused, remote code needs `trust_remote_code`
(`model_source.py`). Read `load_model` and `load_skeleton` first.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from frostline.dtypes import set_dtype
from frostline.errors import ModelError, did_you_mean
from frostline.grouped import use_own_experts
from frostline.model_source import (
    Source,
    check_complete,
    check_exists,
    check_safetensors,
    code_allowed,
    loading,
    pinned,
    place,
    quiet_transformers,
    reason,
)
from frostline.older import mend
from frostline.recipe import ScratchModel


def load_config(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a model; reads no weights. Raises `ModelError`."""
    if isinstance(source, ScratchModel):
        return _scratch_config(source)
    check_exists(source)
    with loading("configuration", source):
        if Path(source).is_file():
            return _config_of_file(Path(source))
        return AutoConfig.from_pretrained(*place(source), **pinned(source, trust_remote_code))


def load_skeleton(source: Source, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The model's structure on the meta device: names and shapes, no weights, no memory. Raises `ModelError`.

    `dtype`: of its weights; that of its configuration when left out.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    with loading("causal language model", source), torch.device("meta"):
        code = code_allowed(config, source, trust_remote_code)
        model = _module(AutoModelForCausalLM.from_config(config, **code))
        if dtype is not None:
            set_dtype(model, dtype)
        return model


def load_fake(
    source: Source, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> tuple[nn.Module, FakeTensorMode]:
    """The model with tensors that have shapes and no values, and the mode they live in. Raises `ModelError`."""
    config = load_config(source, trust_remote_code=trust_remote_code)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with loading("causal language model", source), mode, torch.device("cpu"):
        return _initial(config, source, dtype, trust_remote_code), mode


def load_random(source: Source, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> nn.Module:
    """The model on the CPU with initial weights, whatever weights exist. Raises `ModelError`."""
    config = load_config(source, trust_remote_code=trust_remote_code)
    with loading("causal language model", source):
        return _initial(config, source, dtype, trust_remote_code)


def load_model(
    source: Source,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    unused: list[str] | None = None,
) -> nn.Module:
    """The model with its weights in `dtype` on the CPU. Raises `ModelError`. `unused` gets the names of tensors in its
    files that its configuration has no place for.

    A model from scratch gets initial weights from `seed`: drawn in fp32, whatever `dtype` they are rounded to.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    with loading("model", source):
        if isinstance(source, ScratchModel):
            torch.manual_seed(seed)
            return _initial(config, source, dtype, trust_remote_code)
        check_safetensors(source)
        model, info = AutoModelForCausalLM.from_pretrained(
            *place(source),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_complete` refuses them, and says which
            **pinned(source, trust_remote_code),
        )
        check_complete(source, info)
        if unused is not None:
            unused += sorted(info.get("unexpected_keys") or ())
        set_dtype(model, dtype)
        return _module(model)


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub name. Raises `ModelError`."""
    check_exists(source, has=("config.json", "tokenizer_config.json", "tokenizer.json"))
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(*place(source), **pinned(source, trust_remote_code))
    except ModelError:
        raise
    except Exception as error:  # tokenizers raise whatever their files make them raise
        raise ModelError(
            f"no tokenizer can be loaded from {source} ({reason(error)}).\n"
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


def _initial(config: Any, source: Source, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """A model with the weights that its class draws, in fp32, rounded to `dtype`."""
    code = code_allowed(config, source, trust_remote_code)
    model = _module(AutoModelForCausalLM.from_config(config, dtype=torch.float32, **code))
    set_dtype(model, dtype)
    return model


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
        raise ModelError(f"model: '{spec.architecture}' refuses this configuration: {reason(error)}") from None


def _config_of_file(path: Path) -> Any:
    fields = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(fields, dict) or fields.get("model_type") not in CONFIG_MAPPING:
        found = fields.get("model_type") if isinstance(fields, dict) else None
        near = did_you_mean(str(found), list(CONFIG_MAPPING)) if found else ""
        raise ModelError(f"{path} is no configuration of a known architecture (model_type: {found}).{near}")
    return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
