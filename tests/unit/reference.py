"""The equations of arXiv 2405.04434 as slow loops, one token, head and expert at a time, in fp64.

Written from the paper and independent of dsv2; weights are numpy arrays under their published names.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy import ndarray as Array
from torch import nn

Weights = Mapping[str, Array]


def weights_of(module: nn.Module) -> dict[str, Array]:
    return {name: p.detach().double().numpy().copy() for name, p in module.named_parameters()}


def below(weights: Weights, prefix: str) -> dict[str, Array]:
    """The weights whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / math.sqrt(float(np.mean(x * x)) + eps) * weight


def yarn_speed(i: int, dim: int, theta: float, scaling) -> float:
    """Radians a position of pair i: its own up to the last pair that turns beta_fast times over the
    original context, the s-th part from the first that turns at most beta_slow times, mixed between."""

    def turns(pair: int) -> float:
        return scaling.original_max_position_embeddings * theta ** (-2 * pair / dim) / (2 * math.pi)

    first = 0
    while turns(first + 1) >= scaling.beta_fast:
        first += 1
    last = first
    while turns(last) > scaling.beta_slow:
        last += 1
    own = theta ** (-2 * i / dim)
    if i <= first:
        return own
    if i >= last:
        return own / scaling.factor
    slow = (i - first) / (last - first)
    return (1 - slow) * own + slow * own / scaling.factor


def magnitude(scaling, mscale: float) -> float:
    """m(x) = 0.1 x ln s + 1; with x = 0.707, sqrt(t) = 0.0707 ln s + 1 of section 3.1.4."""
    return 0.1 * mscale * math.log(scaling.factor) + 1


def rope(x: Array, position: int, theta: float, scaling=None) -> Array:
    """Pair i, (x_2i, x_2i+1), as a complex number times exp(j position theta^(-2i / dim))."""
    turned = np.empty_like(x)
    for i in range(len(x) // 2):
        speed = yarn_speed(i, len(x), theta, scaling) if scaling else theta ** (-2 * i / len(x))
        angle = position * speed
        z = complex(x[2 * i], x[2 * i + 1]) * complex(math.cos(angle), math.sin(angle))
        turned[2 * i], turned[2 * i + 1] = z.real, z.imag
    if scaling:
        turned *= magnitude(scaling, scaling.mscale) / magnitude(scaling, scaling.mscale_all_dim)
    return turned


def softmax_scale(width: int, scaling) -> float:
    return (magnitude(scaling, scaling.mscale_all_dim) ** 2 if scaling else 1) / math.sqrt(width)


def mla(h: Array, w: Weights, config) -> Array:
    """Eqs. 37-47 for the tokens h [S, D] of one sequence."""
    heads, nope, rotary = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    v, eps = config.v_head_dim, config.rms_norm_eps
    turning = (config.rope_theta, config.rope_scaling)
    d_c = len(w["kv_a_layernorm.weight"])
    w_dkv, w_kr = w["kv_a_proj_with_mqa.weight"][:d_c], w["kv_a_proj_with_mqa.weight"][d_c:]
    up_of_head = w["kv_b_proj.weight"].reshape(heads, nope + v, d_c)
    compressed = "q_a_proj.weight" in w
    q_weight = w["q_b_proj.weight"] if compressed else w["q_proj.weight"]
    q_of_head = q_weight.reshape(heads, nope + rotary, -1)
    outputs = []
    for t in range(len(h)):
        out_of_heads = []
        for i in range(heads):
            w_uq, w_qr = q_of_head[i, :nope], q_of_head[i, nope:]
            w_uk, w_uv = up_of_head[i, :nope], up_of_head[i, nope:]
            c_q = h[t]
            if compressed:
                c_q = rms_norm(w["q_a_proj.weight"] @ h[t], w["q_a_layernorm.weight"], eps)  # 37
            q = np.concatenate((w_uq @ c_q, rope(w_qr @ c_q, t, *turning)))  # 38-40
            scores, values = [], []
            for j in range(t + 1):
                c_kv = rms_norm(w_dkv @ h[j], w["kv_a_layernorm.weight"], eps)  # 41
                k = np.concatenate((w_uk @ c_kv, rope(w_kr @ h[j], j, *turning)))  # 42-44
                scores.append(q @ k * softmax_scale(nope + rotary, config.rope_scaling))
                values.append(w_uv @ c_kv)  # 45
            out_of_heads.append(softmax(np.array(scores)) @ np.array(values))  # 46
        outputs.append(w["o_proj.weight"] @ np.concatenate(out_of_heads))  # 47
    return np.array(outputs)


def gqa(h: Array, w: Weights, config) -> Array:
    """Heads of one width, of which query head i reads key and value head i * G // H; tokens h [S, D].

    The number G of key and value heads is that of the weights.
    """
    heads, width = config.num_attention_heads, config.qk_nope_head_dim
    groups = len(w["k_proj.weight"]) // width
    turning = (config.rope_theta, config.rope_scaling)
    w_q = w["q_proj.weight"].reshape(heads, width, -1)
    w_k, w_v = (w[f"{name}_proj.weight"].reshape(groups, width, -1) for name in "kv")
    outputs = []
    for t in range(len(h)):
        out_of_heads = []
        for i in range(heads):
            g = i * groups // heads
            q = rope(w_q[i] @ h[t], t, *turning)
            scale = softmax_scale(width, config.rope_scaling)
            scores = [q @ rope(w_k[g] @ h[j], j, *turning) * scale for j in range(t + 1)]
            values = np.array([w_v[g] @ h[j] for j in range(t + 1)])
            out_of_heads.append(softmax(np.array(scores)) @ values)
        outputs.append(w["o_proj.weight"] @ np.concatenate(out_of_heads))
    return np.array(outputs)


def swiglu(u: Array, gate: Array, up: Array, down: Array) -> Array:
    g = gate @ u
    return down @ (g / (1 + np.exp(-g)) * (up @ u))


def affinities(u: Array, centroids: Array) -> Array:
    """Eq. 22 for one token."""
    return softmax(centroids @ u)


def select(s: Sequence[float], top_k: int, n_group: int, topk_group: int) -> list[int]:
    """Section 2.2.2 for one token: its experts by falling affinity, the lower index first among equals."""
    size = len(s) // n_group
    best = [max(s[d * size : (d + 1) * size]) for d in range(n_group)]
    groups = sorted(range(n_group), key=lambda d: (-best[d], d))[:topk_group]
    candidates = [i for i in range(len(s)) if i // size in groups]
    return sorted(candidates, key=lambda i: (-s[i], i))[:top_k]


def moe(u: Array, w: Weights, top_k: int, n_group: int, topk_group: int, scaling: float, keep=None) -> Array:
    """Eq. 20 without the residual for the tokens u [T, D]; `keep` [T][K] leaves out dropped pairs."""
    n_experts = len(w["gate.weight"])
    out = np.zeros_like(u)
    for t in range(len(u)):
        s = affinities(u[t], w["gate.weight"])
        for place, i in enumerate(select(list(s), top_k, n_group, topk_group)):
            if keep is None or keep[t][place]:
                gate, up = np.split(w["experts.w13"][i], 2)
                out[t] += scaling * s[i] * swiglu(u[t], gate, up, w["experts.w2"][i])
        if "shared_experts.gate_proj.weight" in w:
            out[t] += swiglu(u[t], *(w[f"shared_experts.{n}_proj.weight"] for n in ("gate", "up", "down")))
    assert n_experts % n_group == 0
    return out


def balance(s: Array, chosen: list[list[int]], n_group: int, topk_group: int) -> tuple[float, float, float]:
    """Eqs. 23-31 without the alphas, for the T tokens of one sequence: (expert, device, communication)."""
    tokens, n_experts = s.shape
    top_k, size = len(chosen[0]), n_experts // n_group
    f = [n_experts / (top_k * tokens) * sum(i in c for c in chosen) for i in range(n_experts)]
    p = [sum(s[t, i] for t in range(tokens)) / tokens for i in range(n_experts)]
    expert = sum(f[i] * p[i] for i in range(n_experts))
    device = comm = 0.0
    for d in range(n_group):
        members = range(d * size, (d + 1) * size)
        p_group = sum(p[j] for j in members)
        device += sum(f[j] for j in members) / size * p_group
        sent = sum(any(i in members for i in c) for c in chosen)
        comm += n_group / (topk_group * tokens) * sent * p_group
    return expert, device, comm


def kept(
    affinity: Sequence[float], device: Sequence[int], exempt: Sequence[bool], n_group: int, budget: int
) -> list[bool]:
    """Section 2.2.4: on each device drop the lowest affinity until the load is within the budget.

    Of equal affinities the last goes first.
    """
    keep = [True] * len(affinity)
    for d in range(n_group):
        mine = [p for p in range(len(affinity)) if device[p] == d]
        load = len(mine)
        for p in sorted((p for p in mine if not exempt[p]), key=lambda p: (affinity[p], -p)):
            if load <= budget:
                break
            keep[p] = False
            load -= 1
    return keep


def transformer(ids: Sequence[int], w: Weights, config) -> Array:
    """Logits [S, vocabulary] of one sequence."""
    eps = config.rms_norm_eps
    x = np.array([w["model.embed_tokens.weight"][i] for i in ids])
    for layer in range(config.num_hidden_layers):
        lw = below(w, f"model.layers.{layer}.")
        normed = np.array([rms_norm(row, lw["input_layernorm.weight"], eps) for row in x])
        attention = mla if config.attention == "mla" else gqa
        x = x + attention(normed, below(lw, "self_attn."), config)
        normed = np.array([rms_norm(row, lw["post_attention_layernorm.weight"], eps) for row in x])
        ffn = below(lw, "mlp.")
        if layer < config.first_k_dense_replace:
            matrices = [ffn[f"{n}_proj.weight"] for n in ("gate", "up", "down")]
            x = x + np.array([swiglu(row, *matrices) for row in normed])
        else:
            limits = (config.num_experts_per_tok, config.n_group, config.topk_group)
            x = x + moe(normed, ffn, *limits, config.routed_scaling_factor)
    x = np.array([rms_norm(row, w["model.norm.weight"], eps) for row in x])
    return x @ w["lm_head.weight"].T
