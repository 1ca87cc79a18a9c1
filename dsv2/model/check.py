"""Checks of the model's sizes: its layers, attention and RoPE, and what its kernel set supports. No torch."""

import math

from dsv2.config.rules import MANY, refuse, require_above_0, require_positive
from dsv2.config.schema import ModelConfig, RopeScalingConfig, RuntimeConfig
from dsv2.kernels.specs import find_spec
from dsv2.model.attention.kinds import attention_kind


def check_model(model: ModelConfig) -> None:
    """Refuse sizes that no model can have; UserError names the field. moe/check.py checks the experts."""
    sizes = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "max_position_embeddings",
    ]
    require_positive("model", model, sizes)
    require_positive("model", model, ["num_hidden_layers", "num_attention_heads"], most=MANY)
    require_positive("model", model, ["n_shared_experts"], least=0, most=MANY)
    above_0 = ["rms_norm_eps", "rope_theta", "initializer_range", "routed_scaling_factor"]
    require_above_0("model", model, above_0)
    if model.rms_norm_eps >= 1:
        right = "must be below 1: it is added to a mean square of about 1"
        refuse("model.rms_norm_eps", model.rms_norm_eps, right)
    if not 0 <= model.first_k_dense_replace < model.num_hidden_layers:
        refuse(
            "model.first_k_dense_replace",
            model.first_k_dense_replace,
            f"must leave at least one MoE layer of model.num_hidden_layers={model.num_hidden_layers}",
        )
    attention_kind(model).check(model)
    if model.rope_scaling is not None:
        _check_rope_scaling(model, model.rope_scaling)


def _check_rope_scaling(model: ModelConfig, scaling: RopeScalingConfig) -> None:
    section = "model.rope_scaling"
    original = scaling.original_max_position_embeddings
    require_positive(section, scaling, ["factor"])
    require_above_0(section, scaling, ["beta_slow", "mscale", "mscale_all_dim"])
    require_positive(section, scaling, ["original_max_position_embeddings"])
    if not scaling.beta_slow < scaling.beta_fast < math.inf:
        refuse(f"{section}.beta_fast", scaling.beta_fast, f"must be above beta_slow={scaling.beta_slow}")
    if original < (least := math.ceil(2 * math.pi * scaling.beta_slow)):
        refuse(
            f"{section}.original_max_position_embeddings",
            original,
            f"must be at least {least}: the fastest pair must rotate beta_slow={scaling.beta_slow} times",
        )
    if model.rope_theta <= 1:
        refuse("model.rope_theta", model.rope_theta, "must be above 1 with model.rope_scaling")
    if model.max_position_embeddings > scaling.factor * original:
        refuse(
            "model.max_position_embeddings",
            model.max_position_embeddings,
            f"must be at most {scaling.factor * original:g} = {section}.factor x "
            "original_max_position_embeddings",
        )


def check_kernels(model: ModelConfig, runtime: RuntimeConfig) -> None:
    """Refuse sizes and precisions that the kernel set does not support; UserError names the field."""
    spec = find_spec(runtime.kernels)
    spec.check(model, runtime.precision)
    if heads := attention_kind(model).latent_heads(model):
        spec.check_heads(heads)
