"""MLA's queries, keys and values put together in one pass, around cuDNN's attention.

Shapes: B batch, S sequence, T = B * S, H heads, N and R widths without and with rotary embedding,
Q = N + R, V width of a value, X = N + V.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS = 8  # of one program


@triton.jit
def _assemble(
    q,
    kv,
    k_rope,
    cos,
    sin,
    q_out,
    k,
    S,
    H,
    rope_step,
    N: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BN: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Turn the queries' rotary part; put the keys together."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    p = tl.arange(0, R // 2)[None, :]
    angle = (t % S) * (R // 2) + p
    c, s = tl.load(cos + angle), tl.load(sin + angle)

    n = tl.arange(0, BN)[None, :]
    inside = (h < H) & (n < N)
    row = (t * H + h) * (N + R)
    tl.store(q_out + row + n, tl.load(q + row + n, mask=inside), mask=inside)
    even = tl.load(q + row + N + 2 * p, mask=h < H).to(tl.float32)
    odd = tl.load(q + row + N + 2 * p + 1, mask=h < H).to(tl.float32)
    tl.store(q_out + row + N + 2 * p, (even * c - odd * s).to(q_out.dtype.element_ty), mask=h < H)
    tl.store(q_out + row + N + 2 * p + 1, (even * s + odd * c).to(q_out.dtype.element_ty), mask=h < H)

    nope = tl.load(kv + (t * H + h) * (N + V) + n, mask=inside)
    tl.store(k + row + n, nope, mask=inside)
    even = tl.load(k_rope + t * rope_step + 2 * p).to(tl.float32)
    odd = tl.load(k_rope + t * rope_step + 2 * p + 1).to(tl.float32)
    at = k + row + N + 2 * p
    same = tl.zeros((HEADS, R // 2), tl.float32)
    tl.store(at, (even * c - odd * s + same).to(k.dtype.element_ty), mask=h < H)
    tl.store(at + 1, (even * s + odd * c + same).to(k.dtype.element_ty), mask=h < H)


@triton.jit
def _take_apart(
    gq,
    gk,
    gv,
    cos,
    sin,
    q_out,
    kv_out,
    rope_out,
    S,
    H,
    qb,
    qs,
    qh,
    kb,
    ks,
    kh,
    vb,
    vs,
    vh,
    N: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The transpose of `_assemble`: gradients of what it was given."""
    t = tl.program_id(0).to(tl.int64)
    b, place = t // S, t % S
    p = tl.arange(0, R // 2)[None, :]
    c, s = tl.load(cos + place * (R // 2) + p), tl.load(sin + place * (R // 2) + p)
    sum_even = tl.zeros((1, R // 2), tl.float32)
    sum_odd = tl.zeros((1, R // 2), tl.float32)
    n = tl.arange(0, BN)[None, :]
    v = tl.arange(0, BV)[None, :]
    for start in range(0, H, HEADS):
        h = start + tl.arange(0, HEADS)[:, None]
        own = h < H
        at = gq + b * qb + place * qs + h * qh
        out = q_out + (t * H + h) * (N + R)
        tl.store(out + n, tl.load(at + n, mask=own & (n < N)), mask=own & (n < N))
        even = tl.load(at + N + 2 * p, mask=own).to(tl.float32)
        odd = tl.load(at + N + 2 * p + 1, mask=own).to(tl.float32)
        tl.store(out + N + 2 * p, (even * c + odd * s).to(q_out.dtype.element_ty), mask=own)
        tl.store(out + N + 2 * p + 1, (odd * c - even * s).to(q_out.dtype.element_ty), mask=own)

        at = gk + b * kb + place * ks + h * kh
        out = kv_out + (t * H + h) * (N + V)
        tl.store(out + n, tl.load(at + n, mask=own & (n < N)), mask=own & (n < N))
        sum_even += tl.sum(tl.load(at + N + 2 * p, mask=own, other=0.0).to(tl.float32), 0)[None, :]
        sum_odd += tl.sum(tl.load(at + N + 2 * p + 1, mask=own, other=0.0).to(tl.float32), 0)[None, :]
        at = gv + b * vb + place * vs + h * vh
        tl.store(out + N + v, tl.load(at + v, mask=own & (v < V)), mask=own & (v < V))
    out = rope_out + t * R + 2 * p
    tl.store(out, (sum_even * c + sum_odd * s).to(rope_out.dtype.element_ty))
    tl.store(out + 1, (sum_odd * c - sum_even * s).to(rope_out.dtype.element_ty))


class _Assemble(torch.autograd.Function):
    """(queries with rotation, keys, values): the values are a view of kv."""

    @staticmethod
    def forward(ctx, q_BSHQ, kv_BSHX, k_rope_BSR, cos_SP, sin_SP):
        batch, length, heads, width = q_BSHQ.shape
        rope = k_rope_BSR.shape[-1]
        nope, v_dim = width - rope, kv_BSHX.shape[-1] - (width - rope)
        assert q_BSHQ.is_contiguous()
        assert kv_BSHX.is_contiguous()
        turned_BSHQ, k_BSHQ = torch.empty_like(q_BSHQ), torch.empty_like(q_BSHQ)
        widths = (nope, rope, v_dim, triton.next_power_of_2(nope))
        grid = (batch * length, triton.cdiv(heads, HEADS))
        steps = (length, heads, k_rope_BSR.stride(1))
        tensors = (q_BSHQ, kv_BSHX, k_rope_BSR, cos_SP, sin_SP, turned_BSHQ, k_BSHQ)
        _assemble[grid](*tensors, *steps, *widths, HEADS)
        ctx.save_for_backward(cos_SP, sin_SP)
        ctx.sizes = (batch, length, heads, nope, rope, v_dim)
        return turned_BSHQ, k_BSHQ, kv_BSHX[..., nope:]

    @staticmethod
    def backward(ctx, grad_q, grad_k, grad_v):
        batch, length, heads, nope, rope, v_dim = ctx.sizes
        cos_SP, sin_SP = ctx.saved_tensors
        out_q = grad_q.new_empty(batch, length, heads, nope + rope)
        out_kv = grad_q.new_empty(batch, length, heads, nope + v_dim)
        out_rope = grad_q.new_empty(batch, length, rope)
        strides = [step for grad in (grad_q, grad_k, grad_v) for step in grad.stride()[:3]]
        widths = (nope, rope, v_dim, triton.next_power_of_2(nope), triton.next_power_of_2(v_dim))
        tensors = (grad_q, grad_k, grad_v, cos_SP, sin_SP, out_q, out_kv, out_rope)
        _take_apart[(batch * length,)](*tensors, length, heads, *strides, *widths, HEADS)
        return out_q, out_kv, out_rope, None, None


def latent_attention(
    q_BSHQ: Tensor, kv_BSHX: Tensor, k_rope_BSR: Tensor, cos_SP: Tensor, sin_SP: Tensor, scale: float
) -> Tensor:
    q, k, v = _Assemble.apply(q_BSHQ, kv_BSHX, k_rope_BSR, cos_SP, sin_SP)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out_BHSV = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out_BHSV.transpose(1, 2)
