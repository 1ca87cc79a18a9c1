"""The shipped configurations: each is valid, and holds what the paper and its publication say."""

from dataclasses import replace
from functools import reduce

import pytest

from dsv2.config.schema import Precision, RopeScalingConfig
from dsv2.training.validate import validate
from tests.unit.helpers import REPO, compose_config

SHIPPED = sorted(
    f"{path.parent.name}={path.stem}"
    for path in (REPO / "conf").glob("*/*.yaml")
    if path.parent.name != "experiment"
)
FOLDER = REPO / "conf/experiment"
EXPERIMENTS = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))
NEEDED = {  # what a shipped choice leaves to the user
    "data=local": ["data.path=somewhere", "optim.total_tokens=10_000_000"],
    "data=hf_stream": [
        "data.dataset=json",
        "data.tokenizer=somewhere.model",
        "optim.total_tokens=10_000_000",
    ],
    "experiment=v2": ["data.path=somewhere"],
    "experiment=lite": ["data.path=somewhere"],
    "experiment=long_context": ["resume=somewhere", "data.path=somewhere"],
}
PROCESSES = {"v2": 128, "lite": 128}  # of the others: 2


@pytest.mark.parametrize("choice", SHIPPED)
def test_every_shipped_choice_is_valid(choice):
    overrides = [choice, *NEEDED.get(choice, [])]
    if choice.startswith("data=") and choice != "data=stdlib":
        assert len(NEEDED[choice]) > 0
    for world_size in (1, 2):
        validate(compose_config(*overrides), world_size)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_valid(experiment):
    choice = f"experiment={experiment}"
    validate(compose_config(choice, *NEEDED.get(choice, [])), PROCESSES.get(experiment, 2))


def test_long_context_is_the_papers_stage():
    """Section 3.1.4: 1000 steps of 576 sequences of 32K tokens; the context grows from 4K to 160K."""
    config = compose_config("experiment=long_context", *NEEDED["experiment=long_context"])
    assert config.optim.total_tokens == 1000 * 576 * config.data.sequence_length == 1000 * 576 * 2**15
    assert config.optim.batch_size == 576
    assert config.model == replace(
        compose_config("model=v2").model,
        rope_scaling=RopeScalingConfig(),
        max_position_embeddings=160 * 2**10,
    )
    lite = compose_config("experiment=long_context", "model=lite", *NEEDED["experiment=long_context"]).model
    assert (lite.hidden_size, lite.max_position_embeddings) == (2048, 160 * 2**10)


def test_shipped_values_arrive():
    config = compose_config("model=v2", "data=hf_stream", *NEEDED["data=hf_stream"], "runtime=gpu")
    assert config.model.routed_scaling_factor == 16.0
    assert config.model.balance.token_dropping is True
    assert config.data.source == "hf_stream"
    assert config.runtime.precision is Precision.bf16
    assert compose_config("optim.decay_at=[0.8,0.9]").optim.decay_at == [0.8, 0.9]


PUBLISHED = {  # V2, V2-Lite
    "hidden_size": (5120, 2048),
    "num_hidden_layers": (60, 27),
    "num_attention_heads": (128, 16),
    "q_lora_rank": (1536, None),
    "kv_lora_rank": (512, 512),
    "qk_nope_head_dim": (128, 128),
    "qk_rope_head_dim": (64, 64),
    "v_head_dim": (128, 128),
    "intermediate_size": (12288, 10944),
    "moe_intermediate_size": (1536, 1408),
    "n_routed_experts": (160, 64),
    "n_shared_experts": (2, 2),
    "num_experts_per_tok": (6, 6),
    "n_group": (8, 1),
    "topk_group": (3, 1),
    "first_k_dense_replace": (1, 1),
    "routed_scaling_factor": (16.0, 1.0),
    "vocab_size": (102400, 102400),
    "initializer_range": (0.006, 0.006),
    "rms_norm_eps": (1e-6, 1e-6),
    "rope_theta": (10000.0, 10000.0),
    "balance.alpha_expert": (0.003, 0.001),
    "balance.alpha_device": (0.05, 0.0),
    "balance.alpha_comm": (0.02, 0.0),
}


@pytest.mark.parametrize(("preset", "column"), [("v2", 0), ("lite", 1)])
def test_published_sizes(preset, column):
    model = compose_config(f"model={preset}").model
    shipped = {name: reduce(getattr, name.split("."), model) for name in PUBLISHED}
    assert shipped == {name: values[column] for name, values in PUBLISHED.items()}


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_quickstart_fits_as_many_gpus(processes):
    """launch/local.sh asks one process for EP 1, and 4 or 8 processes for smaller micro-batches."""
    overrides = ["parallel.expert_parallel_size=1"] if processes == 1 else []
    if processes > 2:
        overrides = [f"runtime.micro_batch_size={8 // processes}"]
    validate(compose_config("experiment=quickstart", *overrides), processes)
