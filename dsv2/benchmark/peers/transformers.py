"""transformers' DeepseekV2ForCausalLM, set up as its documentation recommends for one GPU."""

from typing import Any

from dsv2.benchmark.peers import Work
from dsv2.benchmark.timing import Step, torch_step
from dsv2.config.schema import ModelConfig
from dsv2.hf.fields import published_config

REQUIRES = {"transformers": ">=5.0"}
ALONE = ()
STATES = None
ABOUT = "grouped_mm experts, SDPA attention, fp32 logits; torch's AdamW on the weights themselves"


def build_model(work: Work) -> Any:
    """Return the model with fresh weights on the device."""
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV2Config

    torch.manual_seed(work.seed)
    config = DeepseekV2Config(**settings(work.model))
    with torch.device(work.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=work.dtype, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    return model.train()


def settings(model: ModelConfig) -> dict[str, Any]:
    """Return `published_config` without the fields of other versions and of generation."""
    dropped = ("architectures", "model_type", "torch_dtype", "bos_token_id", "eos_token_id", "use_cache")
    fields = published_config(model, 0, 0, "bfloat16")
    return {name: value for name, value in fields.items() if name not in dropped} | {"use_cache": False}


def build(work: Work) -> Step:
    model = build_model(work)
    return torch_step(
        model, work, lambda ids, labels: model(input_ids=ids, labels=labels, shift_labels=labels).loss
    )
