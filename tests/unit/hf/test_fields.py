"""config.json: published configurations, models that it cannot express, and the context it promises."""

from pathlib import Path
from typing import Any

import pytest

from dsv2.config.schema import Config, RopeScalingConfig
from dsv2.errors import UserError
from dsv2.hf.fields import check_exportable, compare_config, published_config, with_positions
from tests.unit.helpers import compose_config
from tests.unit.hf.folders import hf_tiny

YARN = RopeScalingConfig()

PUBLISHED_V2 = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
PUBLISHED_LITE = PUBLISHED_V2 | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
}


@pytest.mark.parametrize(("name", "published"), [("v2", PUBLISHED_V2), ("lite", PUBLISHED_LITE)])
def test_the_published_configurations(name: str, published: dict[str, Any]) -> None:
    """Both ways: conf's sizes make them, and they fit conf's sizes."""
    model = compose_config(f"model={name}", "rope_scaling=yarn").model
    made = published_config(model, bos_id=100000, eos_id=100001, dtype="bfloat16")
    assert {key: made.get(key) for key in published} == published
    compare_config(published, model, Path("there"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"attention": "mqa", "qk_nope_head_dim": 6, "v_head_dim": 6},
            r"model\.attention=mqa: must be mla",
        ),
        ({"n_shared_experts": 0}, r"model\.n_shared_experts=0: must be at least 1 for"),
        ({"hidden_size": 25}, r"model\.hidden_size=25: must be a multiple of model\.num_attention_heads=3"),
    ],
)
def test_models_that_it_has_no_words_for(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_exportable(hf_tiny(**changes))


def test_config_promises_no_more_than_yarn_reaches() -> None:
    run = Config(model=hf_tiny(rope_scaling=YARN))
    assert with_positions(run, 163840).max_position_embeddings == 163840
    with pytest.raises(UserError, match=r"model\.max_position_embeddings=163841: must be at most 163840"):
        with_positions(run, 163841)


@pytest.mark.parametrize(
    "groups", [{"n_group": 4, "topk_group": 4}, {"n_group": 1, "topk_group": 1}], ids=str
)
def test_without_a_limit_there_is_one_group(groups: dict[str, int]) -> None:
    """llama.cpp aborts if all of several groups are allowed; `init_from` accepts any groups of it."""
    model = hf_tiny(**groups)
    content = published_config(model, 1, 2, "float32")
    assert {name: content[name] for name in ("topk_method", "n_group", "topk_group")} == {
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    }
    compare_config(content, model, Path("there"))
    compare_config(content | {"n_group": 4, "topk_group": 4}, model, Path("there"))
    with pytest.raises(UserError, match=r"has topk_method=greedy, this run's .*=group_limited_greedy"):
        compare_config(content, hf_tiny(n_group=4, topk_group=2), Path("there"))
