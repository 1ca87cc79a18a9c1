"""Compare the KV cache per token of all kinds of attention, as the paper's tables 1 and 9 do.

`python -m dsv2 cache model=lite [model.FIELD=VALUE ...]` prints the table for any configuration.
"""

from dataclasses import replace

from dsv2.config.schema import ModelConfig
from dsv2.errors import UserError
from dsv2.formats import fmt_count
from dsv2.model.attention.kinds import KINDS, attention_kind
from dsv2.model.sizes import attention_matrices, cached_elements

GROUPS = 8  # key and value heads of the paper's GQA (appendix D.1), if the configuration names no number
COMPARED = ("mla", "mha", "gqa", "mqa")  # the kinds that the paper compares


def mha_heads_with_equal_parameters(model: ModelConfig) -> int:
    """Return the largest number of heads, at least 1, with which MHA has at most this model's parameters.

    Only the parameters of the attention's matrices count.
    """
    one_head = replace(model, attention="mha", num_attention_heads=1, num_key_value_heads=None)
    return max(1, attention_matrices(model) // attention_matrices(one_head))


def rows(model: ModelConfig) -> list[tuple[str, int]]:
    """Return (kind, elements per token) with the layers and head width of `model`.

    The kinds that the paper compares come first. Then comes every other kind that these sizes allow.
    """
    heads = model.num_attention_heads
    groups = model.num_key_value_heads or min(GROUPS, heads)
    mla = replace(model, attention="mla", num_key_value_heads=None)
    matched_heads = mha_heads_with_equal_parameters(mla)

    def grouped(key_value_heads: int) -> int:
        return cached_elements(replace(mla, attention="mha", num_attention_heads=key_value_heads))

    table = [
        (f"MHA, same heads ({heads})", grouped(heads)),
        (f"MHA, as many attention parameters as MLA ({matched_heads} heads)", grouped(matched_heads)),
        (f"GQA, {groups} groups", grouped(groups)),
        ("MQA", grouped(1)),
        ("MLA", cached_elements(mla)),
    ]
    for kind in KINDS:
        candidate = replace(mla, attention=kind.name)
        if kind.name not in COMPARED and _is_possible(candidate):
            table.append((kind.name.upper(), cached_elements(candidate)))
    return table


def _is_possible(model: ModelConfig) -> bool:
    try:
        attention_kind(model).check(model)
    except UserError:
        return False
    return True


def table(model: ModelConfig) -> str:
    """Return the table as text: the elements of each kind, and their share of each MHA row's elements."""
    entries = rows(model)
    same_heads = entries[0][1]
    same_parameters = entries[1][1]
    width = max(len(name) for name, _ in entries)
    lines = [
        f"KV cache per token over {model.num_hidden_layers} layers: elements, and their share of MHA's",
        f"{'':{width}}  elements  of same heads  of as many parameters",
    ]
    for name, count in entries:
        shares = f"{count / same_heads:>13.0%}  {count / same_parameters:>21.0%}"
        lines.append(f"{name:{width}}  {fmt_count(count):>8}  {shares}")
    return "\n".join(lines)
