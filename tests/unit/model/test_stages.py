"""A model cut into stages computes what the whole model computes, and its parameters keep their names."""

import pytest
import torch

from dsv2.model.init import init_weights
from dsv2.model.sizes import cut, head_flops, is_dense, layer_flops
from dsv2.model.stages import Stage
from dsv2.model.transformer import DeepseekV2
from dsv2.moe.execution import Execution
from tests.unit.helpers import compose_config, tiny_config

LENGTH = 9


def make_stages(count: int, recompute: bool = False) -> list[Stage]:
    config = tiny_config(num_hidden_layers=5)
    stages = []
    for index, layers in enumerate(cut(config, count, LENGTH)):
        execution = Execution(recompute=recompute)
        first = index == 0
        stage = Stage(config, layers, first=first, last=index == count - 1, execution=execution).double()
        init_weights(stage, std=0.3, seed=0)
        stages.append(stage)
    return stages


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_stages_one_after_another_are_the_whole_model(count, recompute):
    whole = DeepseekV2(tiny_config(num_hidden_layers=5), Execution(recompute=recompute)).double()
    init_weights(whole, std=0.3, seed=0)
    ids = torch.randint(31, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(2)
    expected = whole(ids[:, :-1], ids[:, 1:], numbers)
    expected.loss.backward()

    stages = make_stages(count, recompute)
    x = ids[:, :-1]
    balances = []
    loads = []
    for stage in stages:
        x, routing = stage.hidden_states(x, numbers)
        if routing:
            balance, stats = stage.losses_and_stats(routing, LENGTH)
            balances.append(balance)
            loads.append(stats.load_E)
    lm_loss = stages[-1].lm_head(x.flatten(0, 1), ids[:, 1:].flatten())
    loss = lm_loss
    for balance in balances:
        loss = stages[-1].with_balance(loss, balance)
    loss.backward()

    assert lm_loss.item() == expected.lm_loss.item()
    torch.testing.assert_close(torch.cat(loads), expected.stats.load_E, atol=0, rtol=0)
    gradients = {name: p.grad for stage in stages for name, p in stage.named_parameters()}
    assert list(gradients) == [name for name, _ in whole.named_parameters()]
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-12, rtol=1e-9, msg=name)


def test_only_the_ends_have_embedding_and_head():
    names = [{name.split(".")[1] for name, _ in stage.named_parameters()} for stage in make_stages(3)]
    assert names == [{"embed_tokens", "layers"}, {"layers"}, {"layers", "norm", "weight"}]


def test_a_cut_covers_all_layers_in_order_and_is_the_best():
    for count in range(1, 6):
        config = tiny_config(num_hidden_layers=5)
        stages = cut(config, count, LENGTH)
        assert [layer for stage in stages for layer in stage] == list(range(5))
        assert all(len(stage) > 0 for stage in stages)


@pytest.mark.parametrize(("name", "count"), [("lite", 2), ("lite", 4), ("v2", 16)])
def test_the_costliest_stage_of_the_published_models(name, count):
    """No border can be moved by a layer so that the costliest stage becomes cheaper."""
    model = compose_config(f"model={name}").model
    costs = [layer_flops(model, is_dense(model, n), 4096) for n in range(model.num_hidden_layers)]
    costs[-1] += head_flops(model)
    stages = cut(model, count, 4096)

    def costliest(ends: list[int]) -> int:
        starts = [0, *ends]
        return max(sum(costs[a:b]) for a, b in zip(starts, [*ends, len(costs)], strict=True))

    ends = [stage.stop for stage in stages[:-1]]
    least = costliest(ends)
    for index in range(len(ends)):
        for step in (-1, 1):
            moved = [end + step * (number == index) for number, end in enumerate(ends)]
            if sorted(set(moved)) == moved and moved[0] > 0 and moved[-1] < len(costs):
                assert costliest(moved) >= least
    assert least < 1.25 * sum(costs) / count
