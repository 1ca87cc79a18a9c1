"""The KV cache per token by kind of attention, as in the paper's tables 1 and 9, for any configuration.

python -m dsv2 cache model=lite [model.FIELD=VALUE ...]
"""

from dataclasses import replace

from dsv2.config.schema import AttentionKind, ModelConfig
from dsv2.formats import fmt_count
from dsv2.planner.cache import elements_per_token, mha_heads_of_as_many_parameters

GROUPS = 8  # of the paper's GQA (appendix D.1), where the configuration names none


def rows(model: ModelConfig) -> list[tuple[str, int]]:
    """(kind, elements per token) with the layers and head width of `model`."""
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    groups = groups or min(GROUPS, heads)
    mla = replace(model, attention=AttentionKind.mla, num_key_value_heads=None)
    matched = mha_heads_of_as_many_parameters(mla)

    def dense(n: int) -> int:
        mha = replace(mla, attention=AttentionKind.mha, num_attention_heads=n)
        return elements_per_token(mha)

    return [
        (f"MHA, same heads ({heads})", dense(heads)),
        (f"MHA, as many attention parameters as MLA ({matched} heads)", dense(matched)),
        (f"GQA, {groups} groups", dense(groups)),
        ("MQA", dense(1)),
        ("MLA", elements_per_token(mla)),
    ]


def table(model: ModelConfig) -> str:
    """Its text: elements of each kind, and what share of either MHA's they are."""
    entries = rows(model)
    same, matched = entries[0][1], entries[1][1]
    width = max(len(name) for name, _ in entries)
    lines = [
        f"KV cache per token over {model.num_hidden_layers} layers, elements, and its share of MHA's",
        f"{'':{width}}  elements  of same heads  of as many parameters",
    ]
    for name, count in entries:
        lines.append(
            f"{name:{width}}  {fmt_count(count):>8}  {count / same:>13.0%}  {count / matched:>21.0%}"
        )
    return "\n".join(lines)
