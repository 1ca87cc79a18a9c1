"""torchtitan's DeepSeek model on one GPU, as a library: modules, overrides and compilation, no trainer."""

import importlib
from collections.abc import Callable
from typing import Any

from dsv2.benchmark.peers import Work
from dsv2.benchmark.timing import Step, torch_step

REQUIRES = {
    "torchtitan": "==0.3.0",
    "torch": ">=2.11",
    "spmd_types": "==0.2.3",
    "tyro": ">=1.0",
    "triton": ">=3.0",
}
ALONE = ("torchtitan",)  # only its trainer needs its other dependencies, older than requirements.txt's
STATES = None
ABOUT = (
    "on a GPU fused MLA, SwiGLU and experts, each block and the loss compiled, SDPA through cuDNN; "
    "softmax scores, no bias, no group limit, plain RoPE; torch's AdamW on the weights themselves"
)
OVERRIDES = [
    "torchtitan.overrides.fused_mla.fused_mla",
    "torchtitan.overrides.fused_swiglu.fused_swiglu",
    "torchtitan.overrides.fused_swiglu.fused_grouped_experts",
]


def fill_in_torch() -> None:
    """Define two names of torch 2.13 in older versions, so that torchtitan's modules can be imported.

    `DataParallelMeshDims` is only an annotation in code for many processes. `Tag.inplace` marks an operator
    that returns the argument it writes to, which older versions refuse. Nobody uses that result, so here the
    operator returns nothing.
    """
    import torch

    fsdp: Any = importlib.import_module("torch.distributed.fsdp")
    if not hasattr(fsdp, "DataParallelMeshDims"):
        fsdp.DataParallelMeshDims = object
    if hasattr(torch.Tag, "inplace"):
        return
    torch_custom_op = torch.library.custom_op
    inplace = object()

    def custom_op(name: str, *args: Any, **options: Any) -> Any:
        if options.get("tags") is not inplace:
            return torch_custom_op(name, *args, **options)
        assert name == "torchtitan::fused_mla_q_rope_", name
        del options["tags"]
        schema = "(Tensor(a!) q, Tensor cache, Tensor positions, SymInt nope, bool inverse) -> ()"
        return lambda function: torch_custom_op(name, schema=schema, **options)(_without_result(function))

    for owner, name, value in ((torch.Tag, "inplace", inplace), (torch.library, "custom_op", custom_op)):
        setattr(owner, name, value)


def _without_result(function: Callable[..., Any]) -> Callable[..., None]:
    def run(*arguments: Any) -> None:
        function(*arguments)

    return run


def model_config(work: Work) -> Any:
    """Return torchtitan's configuration with our sizes."""
    fill_in_torch()
    titan: Any = importlib.import_module("torchtitan.models.deepseek_v3")
    common: Any = importlib.import_module("torchtitan.models.common")
    attention: Any = importlib.import_module("torchtitan.models.common.attention")
    model = work.model
    width = model.hidden_size
    rope = common.ComplexRoPE.Config(
        dim=model.qk_rope_head_dim, max_seq_len=work.length, theta=model.rope_theta, scaling="none"
    )
    layers = titan.build_mla_moe_layers(
        n_layers=model.num_hidden_layers,
        n_dense_layers=model.first_k_dense_replace,
        dim=width,
        n_heads=model.num_attention_heads,
        q_lora_rank=model.q_lora_rank or 0,
        kv_lora_rank=model.kv_lora_rank,
        qk_nope_head_dim=model.qk_nope_head_dim,
        qk_rope_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        mscale=1.0,
        dense_hidden_dim=model.intermediate_size,
        moe_hidden_dim=model.moe_intermediate_size,
        num_experts=model.n_routed_experts,
        num_shared_experts=model.n_shared_experts,
        router_top_k=model.num_experts_per_tok,
        router_score_func="softmax",
        router_route_scale=model.routed_scaling_factor,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        linear_init=titan._LINEAR_INIT,
        norm_init=titan._NORM_INIT,
        depth_init=titan._depth_init,
        depth_experts_init=titan._depth_experts_init,
        rope=rope,
    )
    for layer in layers:
        layer.attention.inner_attention = attention.ScaledDotProductAttention.Config()
        if layer.moe is not None:
            layer.moe.load_balance_coeff = None
    return titan.DeepSeekV3Model.Config(
        vocab_size=model.vocab_size,
        dim=width,
        tok_embeddings=common.Embedding.Config(
            num_embeddings=model.vocab_size, embedding_dim=width, param_init=titan._EMBEDDING_INIT
        ),
        norm=common.RMSNorm.Config(normalized_shape=width, param_init=titan._NORM_INIT),
        lm_head=common.Linear.Config(
            in_features=width, out_features=model.vocab_size, param_init=titan._output_linear_init(width)
        ),
        layers=layers,
        mtp_layers=[],
    )


def build_model(work: Work) -> Any:
    """Return the model with fresh weights on the device; on a GPU, compiled and with the overrides."""
    import torch

    config = model_config(work)
    distributed: Any = importlib.import_module("torchtitan.distributed.utils")
    distributed.set_spmd_backend("partial_dtensor")  # the only backend that works without a mesh
    fused = work.device.type == "cuda"
    if fused:
        override: Any = importlib.import_module("torchtitan.config.override")
        override.apply_overrides(override.OverrideConfig(imports=OVERRIDES), config)
    torch.manual_seed(work.seed)
    with torch.device("meta"):
        model = config.build()
    model.to(work.dtype).to_empty(device=work.device)
    with torch.no_grad():
        model.init_states(buffer_device=work.device)
    if fused:  # like torchtitan.distributed.compile.apply_compile, which needs a mesh
        torch._dynamo.config.capture_scalar_outputs = True
        for block in model.layers.values():
            block.compile(fullgraph=True)
    return model


def build(work: Work) -> Step:
    import torch

    components: Any = importlib.import_module("torchtitan.components.loss")
    model = build_model(work)
    loss_of = components.cross_entropy_loss
    if work.device.type == "cuda":
        loss_of = torch.compile(loss_of)
    return torch_step(model, work, lambda ids, labels: loss_of(model(ids), labels) / labels.numel())
