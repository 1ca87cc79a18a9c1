"""The registry of attention kinds: `model.attention` is the name of one of them."""

from dsv2.config.rules import refuse
from dsv2.config.schema import ModelConfig
from dsv2.model.attention.base import AttentionKind
from dsv2.model.attention.grouped import GroupedQuery, MultiHead, MultiQuery
from dsv2.model.attention.mla import MultiHeadLatent

KINDS: tuple[AttentionKind, ...] = (MultiHeadLatent(), MultiHead(), GroupedQuery(), MultiQuery())


def attention_kind(model: ModelConfig) -> AttentionKind:
    """Return the spec of the model's attention.

    Raises:
        UserError: `model.attention` names no kind.
    """
    by_name = {kind.name: kind for kind in KINDS}
    if model.attention not in by_name:
        refuse("model.attention", model.attention, f"must be one of {', '.join(by_name)}")
    return by_name[model.attention]
