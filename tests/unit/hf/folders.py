"""What tests of Hugging Face folders share: our model with odd weights, and transformers' with the same."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from data.config import DataConfig
from data.tokenizers.train import train_tokenizer
from dsv2.config.schema import Config, ModelConfig
from dsv2.hf.export import export
from dsv2.hf.fields import published_config
from dsv2.hf.names import published_parts
from dsv2.model.init import init_weights
from dsv2.model.transformer import DeepseekV2
from tests.unit.data.tokenizers.texts import SENTENCES
from tests.unit.helpers import save_checkpoint, tiny_config

TOKENIZER_PIECES = 320


def hf_tiny(**changes: Any) -> ModelConfig:
    """Every size different; `transformers` wants hidden_size to be a multiple of the heads."""
    sizes = {"hidden_size": 24, "max_position_embeddings": 163840, "vocab_size": 324}
    return tiny_config(**sizes | changes)


def our_model(config: ModelConfig) -> DeepseekV2:
    """fp32 on CPU, with outputs of order 1 and norms far from 1."""
    model = DeepseekV2(config)
    init_weights(model, std=0.3, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


def in_published_names(model: DeepseekV2, of: dict[str, Tensor], stacked: bool) -> dict[str, Tensor]:
    """`of` holds a tensor for each of the model's parameters: the same under the published names."""
    return {
        part.name: of[name][part.indices]
        for name, _, parts in published_parts(model, stacked)
        for part in parts
    }


def their_model(model: DeepseekV2) -> DeepseekV2ForCausalLM:
    """transformers' model with the same weights, put in through its own names, without files."""
    config = DeepseekV2Config(**published_config(model.config, bos_id=1, eos_id=2, dtype="float32"))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the default one wants widths that are multiples of 4
    theirs = DeepseekV2ForCausalLM(config).eval()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    theirs.load_state_dict(in_published_names(model, weights, stacked=True))
    return theirs


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, missing
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def published_checkpoint(folder: Path, model: DeepseekV2, step: int = 7) -> Path:
    """A checkpoint of the model, `folder/step-N`, whose run had the tokenizer beside it."""
    tokenizer = folder / "tokenizer.model"
    data = DataConfig(source="hf_stream", path="", dataset="json", tokenizer=str(tokenizer))
    if not tokenizer.exists():
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer(SENTENCES * 5, TOKENIZER_PIECES, tokenizer)
    return save_checkpoint(folder / f"step-{step:08d}", model, Config(model=model.config, data=data))


def exported_folder(folder: Path, model: DeepseekV2, dtype: str = "fp32", **options: Any) -> Path:
    """The model as `python -m dsv2 export` writes it."""
    export(published_checkpoint(folder / "saved", model), folder / "exported", dtype, **options)
    return folder / "exported"


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    parameters = dict(other.named_parameters())
    assert len(parameters) > 20
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, parameters.pop(name)), name
    assert not parameters
