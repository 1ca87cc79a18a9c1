"""`ModelConfig` and the published config.json: written, and compared.

Most fields have the same names in both. The attention's and the router's fields come from their specs.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from data.reading import is_folder, read_json
from dsv2.config.rules import refuse
from dsv2.config.schema import Config, ModelConfig, RopeScalingConfig
from dsv2.errors import UserError
from dsv2.model.attention.kinds import attention_kind
from dsv2.model.check import check_model
from dsv2.moe.routers.kinds import router_of

ARCHITECTURE = "DeepseekV2ForCausalLM"
MODEL_TYPE = "deepseek_v2"

_SAME = (  # names and meanings are equal, and another value is another function
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "first_k_dense_replace",
    "rms_norm_eps",
)
_ALWAYS = {  # what this project implements
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_YARN = tuple(RopeScalingConfig.__dataclass_fields__)


def _function_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields that decide what the model computes, except RoPE's.

    Raises:
        UserError: the published architecture has no such attention or router.
    """
    return {
        **{name: getattr(model, name) for name in _SAME},
        **_ALWAYS,
        **attention_kind(model).published(model),
        **router_of(model).published(model),
    }


def check_exportable(model: ModelConfig) -> None:
    """Refuse a model that the published architecture cannot express; UserError names the field."""
    _function_fields(model)
    if model.n_shared_experts == 0:
        refuse("model.n_shared_experts", 0, f"must be at least 1 for Hugging Face's {ARCHITECTURE}")
    if model.hidden_size % model.num_attention_heads:
        right = f"must be a multiple of model.num_attention_heads={model.num_attention_heads}"
        refuse("model.hidden_size", model.hidden_size, f"{right} for Hugging Face's {ARCHITECTURE}")


def with_positions(config: Config, positions: int | None) -> ModelConfig:
    """Return the run's model with the `max_position_embeddings` that config.json promises.

    Clients take this field for the context in which the weights work. Without YaRN that is the length of
    the run's training sequences. With YaRN it is the extended context, as in the published configuration.

    Args:
        positions: replaces that length, for weights that an earlier run trained on longer sequences.

    Raises:
        UserError: no model can have so many positions.
    """
    model = config.model
    if positions is not None:
        model = replace(model, max_position_embeddings=positions)
        check_model(model)
        return model
    if model.rope_scaling is not None:
        return model
    return replace(model, max_position_embeddings=config.data.sequence_length)


def published_config(model: ModelConfig, bos_id: int, eos_id: int, dtype: str) -> dict[str, Any]:
    """Return the content of config.json, with the fields of the published configuration.

    Args:
        dtype: torch's name for the type of the weights, such as bfloat16.
    """
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **_function_fields(model),
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


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    scaling = model.rope_scaling
    return None if scaling is None else {"type": "yarn", **{name: getattr(scaling, name) for name in _YARN}}


def read_config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json.

    Raises:
        UserError: the folder or the file is missing, is not JSON, or describes another architecture.
    """
    if not is_folder(folder):
        raise UserError(f"init_from={folder}: there is no such folder; download the model into one first")
    path = folder / "config.json"
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"init_from={folder}: config.json is missing, so this is not a Hugging Face model"
        ) from None
    except ValueError as error:
        raise UserError(f"init_from={folder}: config.json cannot be read ({error})") from None
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type != MODEL_TYPE:
        raise UserError(f"init_from={folder}: config.json has model_type={model_type}, not {MODEL_TYPE}")
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(value := content.get(name), dict | None):
            raise UserError(f"init_from={folder}: config.json has {name}={value!r}, which is no object")
    return content


def compare_config(content: dict[str, Any], model: ModelConfig, folder: Path) -> None:
    """Refuse weights that mean another function than this run's model.

    Lengths, balance losses and initialisation may differ, as after a checkpoint.

    Raises:
        UserError: names the field of config.json, its value, and this run's value.
    """
    ours = _function_fields(model)
    defaults = {**_ALWAYS, **attention_kind(model).published_defaults(model)}
    given = {name: value for name, value in content.items() if value is not None}
    fields = router_of(model).read_published(defaults | given)
    theirs = {name: fields.get(name) for name in ours}
    their_theta, their_scaling = _their_rope(content)
    theirs |= {"rope_theta": their_theta, "rope_scaling": their_scaling}
    ours |= {"rope_theta": model.rope_theta, "rope_scaling": _rope_scaling(model)}
    theirs["quantization_config"] = content.get("quantization_config")
    ours["quantization_config"] = None
    for name, value in ours.items():
        if theirs[name] != value:
            raise UserError(
                f"init_from={folder}: config.json has {name}={theirs[name]}, this run's model {name}={value}"
            )


def _their_rope(content: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return theta, and scaling as `_rope_scaling` writes it.

    `transformers` 5 keeps both in `rope_parameters`.
    """
    scaling = dict(content.get("rope_parameters") or content.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", content.get("rope_theta", 10000.0))
    kinds = [scaling.pop(key) for key in ("type", "rope_type") if key in scaling]
    if not kinds or kinds[-1] == "default":
        return theta, None
    return theta, {"type": kinds[-1], "beta_fast": 32.0, "beta_slow": 1.0} | scaling
