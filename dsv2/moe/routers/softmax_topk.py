"""Device-limited routing by softmax affinities (arXiv 2405.04434, eqs. 21-22 and section 2.2.2): the spec."""

from typing import TYPE_CHECKING, Any

from dsv2.config.rules import divisors, refuse, require_positive
from dsv2.config.schema import ModelConfig
from dsv2.moe.reach import mean_ranks
from dsv2.moe.routers.base import Router
from dsv2.moe.sizes import Shapes
from dsv2.parallel.micro_batch import FP32, INT64, MicroBatch, Table

if TYPE_CHECKING:
    from dsv2.kernels.sets import KernelSet
    from dsv2.moe.routers.softmax_topk_module import SoftmaxTopKRouter


class SoftmaxTopK(Router):
    """The K experts of highest affinity within the M groups of highest affinity."""

    name = "softmax_topk"

    def check(self, model: ModelConfig) -> None:
        experts = model.n_routed_experts
        groups = model.n_group
        limit = model.topk_group
        require_positive("model", model, ["num_experts_per_tok", "n_group", "topk_group"])
        if experts % groups:
            right = f"must divide model.n_routed_experts={experts}: one of {divisors(experts)}"
            refuse("model.n_group", groups, right)
        if limit > groups:
            refuse("model.topk_group", limit, f"must be at most model.n_group={groups}")
        if model.num_experts_per_tok > limit * experts // groups:
            refuse(
                "model.num_experts_per_tok",
                model.num_experts_per_tok,
                f"must be at most {limit * experts // groups}, the experts that model.topk_group={limit} of "
                f"model.n_group={groups} groups hold",
            )

    def parameters(self, model: ModelConfig) -> Shapes:
        return {"weight": (model.n_routed_experts, model.hidden_size)}

    def mean_ranks(self, model: ModelConfig, ep_size: int) -> float:
        return mean_ranks(model, ep_size, limited=True)

    def kept_bytes(self, run: MicroBatch) -> Table:
        model = run.model
        experts = model.n_routed_experts
        if run.fused:
            per_token = experts * FP32 + model.num_experts_per_tok * INT64
            return {"router: affinities and ids": run.tokens * per_token}
        return {
            "router: input in fp32": run.cast * run.tokens * model.hidden_size * FP32,
            "router: centroids in fp32": run.cast * experts * model.hidden_size * FP32,
            # The chosen ids are a view of the sort over all experts.
            "router: affinities and ids": run.tokens * experts * (FP32 + INT64),
        }

    def published(self, model: ModelConfig) -> dict[str, Any]:
        limited = model.topk_group < model.n_group
        return {
            "topk_method": "group_limited_greedy" if limited else "greedy",
            # Without a limit the groups do not matter. llama.cpp aborts if all of several groups are allowed.
            "n_group": model.n_group if limited else 1,
            "topk_group": model.topk_group if limited else 1,
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "routed_scaling_factor": model.routed_scaling_factor,
        }

    def read_published(self, content: dict[str, Any]) -> dict[str, Any]:
        fields = {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False} | content
        if fields["topk_method"] == "greedy":  # which ignores the groups
            return fields | {"n_group": 1, "topk_group": 1}
        return fields

    def build(self, model: ModelConfig, kernels: "KernelSet") -> "SoftmaxTopKRouter":
        from dsv2.moe.routers.softmax_topk_module import SoftmaxTopKRouter

        return SoftmaxTopKRouter(model, kernels)
