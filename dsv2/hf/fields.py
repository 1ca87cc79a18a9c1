"""`ModelConfig` and the published config.json: written, and compared.

Fields have the same names in both, but for RoPE's, and for how experts are selected: `topk_method` is
`group_limited_greedy` where a token may reach fewer than all groups, else `greedy`.
"""

import json
from pathlib import Path
from typing import Any

from dsv2.config.schema import AttentionKind, ModelConfig, RopeScalingConfig
from dsv2.errors import UserError

ARCHITECTURE = "DeepseekV2ForCausalLM"
MODEL_TYPE = "deepseek_v2"

_SAME = (  # names and meanings are equal, and another value is another function
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "first_k_dense_replace",
    "routed_scaling_factor",
    "rms_norm_eps",
)
_ALWAYS = {  # what this project implements; a folder may leave a field out where the value is usual
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_YARN = tuple(RopeScalingConfig.__dataclass_fields__)


def check_exportable(model: ModelConfig) -> None:
    """Refuse a model that the published architecture has no words for; UserError names the field."""
    attention, shared, hidden, heads = (
        model.attention,
        model.n_shared_experts,
        model.hidden_size,
        model.num_attention_heads,
    )
    for fits, given, wanted in (
        (attention is AttentionKind.mla, f"attention={attention.value}", "mla only"),
        (shared > 0, f"n_shared_experts={shared}", "at least 1"),
        (hidden % heads == 0, f"hidden_size={hidden}", f"a multiple of num_attention_heads={heads}"),
    ):
        if not fits:
            raise UserError(f"model.{given}: Hugging Face's {ARCHITECTURE} takes {wanted}")


def published_config(model: ModelConfig, bos_id: int, eos_id: int, dtype: str) -> dict[str, Any]:
    """The content of config.json, with the fields of the published configuration.

    Args:
        dtype: torch's name for that of the weights, such as bfloat16.
    """
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{name: getattr(model, name) for name in _SAME},
        **_ALWAYS,
        "num_key_value_heads": model.num_attention_heads,
        "topk_method": _topk_method(model),
        "rope_theta": model.rope_theta,
        "rope_scaling": _rope_scaling(model),
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.initializer_range,
        "aux_loss_alpha": model.balance.alpha_expert,
        "seq_aux": True,  # balance is counted within each sequence
        "attention_dropout": 0.0,
        "ep_size": 1,
        "pretraining_tp": 1,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }


def _topk_method(model: ModelConfig) -> str:
    return "group_limited_greedy" if model.topk_group < model.n_group else "greedy"


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    scaling = model.rope_scaling
    return None if scaling is None else {"type": "yarn", **{name: getattr(scaling, name) for name in _YARN}}


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        UserError: it is missing, no JSON, or of another architecture.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"init_from={folder}: there is no config.json; it is no Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise UserError(f"init_from={folder}: config.json cannot be read ({error})") from None
    found = content.get("model_type") if isinstance(content, dict) else None
    if found != MODEL_TYPE:
        raise UserError(f"init_from={folder}: config.json has model_type={found}, not {MODEL_TYPE}")
    return content


def compare_config(content: dict[str, Any], model: ModelConfig, folder: Path) -> None:
    """Refuse weights that mean another function than this run's model.

    Lengths, balance losses and initialisation may differ, as after a checkpoint.

    Raises:
        UserError: names the field of config.json, its value, and that of this run.
    """
    theirs = {"attention": AttentionKind.mla.value} | {name: content.get(name) for name in _SAME}
    theirs |= {name: content.get(name, usual) for name, usual in _ALWAYS.items()}
    ours = {"attention": model.attention.value} | {name: getattr(model, name) for name in _SAME} | _ALWAYS
    theirs["num_key_value_heads"] = content.get("num_key_value_heads") or theirs["num_attention_heads"]
    ours["num_key_value_heads"] = model.num_attention_heads
    theirs["topk_method"], ours["topk_method"] = content.get("topk_method", "greedy"), _topk_method(model)
    if theirs["topk_method"] == "greedy":  # groups play no part in it; they may be left out
        for name in ("n_group", "topk_group"):
            theirs[name] = theirs[name] or ours[name]
    theirs["rope_theta"], theirs["rope_scaling"] = _their_rope(content)
    ours["rope_theta"], ours["rope_scaling"] = model.rope_theta, _rope_scaling(model)
    theirs["quantization_config"], ours["quantization_config"] = content.get("quantization_config"), None
    for name, value in ours.items():
        if theirs[name] != value:
            raise UserError(
                f"init_from={folder}: config.json has {name}={theirs[name]}, this run's model {name}={value}"
            )


def _their_rope(content: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling as `_rope_scaling` writes it); `transformers` 5 keeps both in `rope_parameters`."""
    found = dict(content.get("rope_parameters") or content.get("rope_scaling") or {})
    theta = found.pop("rope_theta", content.get("rope_theta", 10000.0))
    kinds = [found.pop(key) for key in ("type", "rope_type") if key in found]
    if not kinds or kinds[-1] == "default":
        return theta, None
    return theta, {"type": kinds[-1], "beta_fast": 32.0, "beta_slow": 1.0} | found
