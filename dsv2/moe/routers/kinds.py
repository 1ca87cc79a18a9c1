"""The registry of routers: `model.router` is the name of one of them."""

from dsv2.config.rules import refuse
from dsv2.config.schema import ModelConfig
from dsv2.moe.routers.base import Router
from dsv2.moe.routers.softmax_topk import SoftmaxTopK

ROUTERS: tuple[Router, ...] = (SoftmaxTopK(),)


def router_of(model: ModelConfig) -> Router:
    """Return the spec of the model's router.

    Raises:
        UserError: no router has the name `model.router`.
    """
    by_name = {router.name: router for router in ROUTERS}
    if model.router not in by_name:
        refuse("model.router", model.router, f"must be one of {', '.join(by_name)}")
    return by_name[model.router]
