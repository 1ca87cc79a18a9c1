"""The KV cache per token by kind of attention, as in the paper's tables 1 and 9, for any configuration.

python -m dsv2 cache model=lite [model.FIELD=VALUE ...]
"""

from dataclasses import replace

from dsv2.config.schema import ModelConfig
from dsv2.errors import UserError
from dsv2.formats import fmt_count
from dsv2.model.attention.kinds import KINDS, attention_kind
from dsv2.model.sizes import attention_matrices, cached_elements

GROUPS = 8  # of the paper's GQA (appendix D.1), unless the configuration names a number
COMPARED = ("mla", "mha", "gqa", "mqa")  # the kinds that the paper compares


def mha_heads_of_as_many_parameters(model: ModelConfig) -> int:
    """Return the most heads with which MHA has no more attention parameters than this model; at least 1."""
    single = replace(model, attention="mha", num_attention_heads=1, num_key_value_heads=None)
    return max(1, attention_matrices(model) // attention_matrices(single))


def rows(model: ModelConfig) -> list[tuple[str, int]]:
    """Return (kind, elements per token) with the layers and head width of `model`.

    The paper's comparison comes first, then every other kind of attention that these sizes allow.
    """
    heads = model.num_attention_heads
    groups = model.num_key_value_heads or min(GROUPS, heads)
    latent = replace(model, attention="mla", num_key_value_heads=None)
    matched = mha_heads_of_as_many_parameters(latent)

    def grouped(key_value_heads: int) -> int:
        return cached_elements(replace(latent, attention="mha", num_attention_heads=key_value_heads))

    table = [
        (f"MHA, same heads ({heads})", grouped(heads)),
        (f"MHA, as many attention parameters as MLA ({matched} heads)", grouped(matched)),
        (f"GQA, {groups} groups", grouped(groups)),
        ("MQA", grouped(1)),
        ("MLA", cached_elements(latent)),
    ]
    for kind in KINDS:
        other = replace(latent, attention=kind.name)
        if kind.name not in COMPARED and _is_possible(other):
            table.append((kind.name.upper(), cached_elements(other)))
    return table


def _is_possible(model: ModelConfig) -> bool:
    try:
        attention_kind(model).check(model)
    except UserError:
        return False
    return True


def table(model: ModelConfig) -> str:
    """Return the table's text: elements of each kind, and their share of both MHA rows."""
    entries = rows(model)
    same = entries[0][1]
    matched = entries[1][1]
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
