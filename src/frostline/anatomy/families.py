"""What structure alone cannot tell: what the modules of a block are called in transformers.

Only attribute names stand here, never model types. `read.py` uses them; a name that is missing here is refused
there with the list of what was not understood.
"""

from __future__ import annotations

ATTENTION_PARTS: dict[str, str] = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "c_proj": "o",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
}
"""Attribute of an attention module → part of `attn`."""

PACKED_QKV = ("c_attn",)
"""Attributes of an attention module that hold q, k and v, in this order, one after another along the outputs."""

FFN_PARTS: dict[str, str] = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "c_fc": "up",
    "c_proj": "down",
}
"""Attribute of a dense FFN module → part of `ffn`."""

ROUTERS = ("gate", "router")
"""Attributes of a mixture-of-experts module that hold the router."""

EXPERTS = ("experts",)
"""Attributes of a mixture-of-experts module that hold the packed experts."""

PRE_NORMS: dict[str, str] = {"input_layernorm": "attn_norm", "ln_1": "attn_norm", "ln_2": "ffn_norm"}
"""Attribute of a block → the norm's name, where the attribute means the same everywhere."""

POST_ATTENTION_NORM = "post_attention_layernorm"
"""Feeds the FFN, unless the block has a norm of its own before or after the FFN: then it follows attention."""

FFN_NORMS: dict[str, str] = {
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "ffn_post_norm",
}
"""Attribute of a block with sandwich or post-norms → the norm's name."""
