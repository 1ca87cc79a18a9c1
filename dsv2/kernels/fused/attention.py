"""MLA's queries, keys and values put together in one pass, around cuDNN's attention or FlashAttention-4.

Shapes: B batch, S sequence, T = B * S, H heads, N and R widths without and with rotary embedding,
Q = N + R, V width of a value, X = N + V.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS = 8  # of one program


@triton.jit
def _turn(x, cos, sin):
    """Each interleaved pair of the columns turned by its angle, fp32."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)


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
    n, r = tl.arange(0, BN)[None, :], tl.arange(0, R)[None, :]
    angle = (t % S) * (R // 2) + tl.arange(0, R // 2)[None, :]
    c, s = tl.load(cos + angle), tl.load(sin + angle)

    inside = (h < H) & (n < N)
    row = (t * H + h) * (N + R)
    tl.store(q_out + row + n, tl.load(q + row + n, mask=inside), mask=inside)
    turned = _turn(tl.load(q + row + N + r, mask=h < H, other=0.0), c, s)
    tl.store(q_out + row + N + r, turned.to(q_out.dtype.element_ty), mask=h < H)

    nope = tl.load(kv + (t * H + h) * (N + V) + n, mask=inside)
    tl.store(k + row + n, nope, mask=inside)
    turned = _turn(tl.load(k_rope + t * rope_step + r), c, s)
    of_every_head = tl.broadcast_to(turned, (HEADS, R))
    tl.store(k + row + N + r, of_every_head.to(k.dtype.element_ty), mask=h < H)


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
    angle = place * (R // 2) + tl.arange(0, R // 2)[None, :]
    c, s = tl.load(cos + angle), -tl.load(sin + angle)
    of_all_heads = tl.zeros((1, R), tl.float32)
    n, r, v = tl.arange(0, BN)[None, :], tl.arange(0, R)[None, :], tl.arange(0, BV)[None, :]
    for start in range(0, H, HEADS):
        h = (start + tl.arange(0, HEADS)[:, None]).to(tl.int64)
        own = h < H
        at = gq + b * qb + place * qs + h * qh
        out = q_out + (t * H + h) * (N + R)
        tl.store(out + n, tl.load(at + n, mask=own & (n < N)), mask=own & (n < N))
        turned = _turn(tl.load(at + N + r, mask=own, other=0.0), c, s)
        tl.store(out + N + r, turned.to(q_out.dtype.element_ty), mask=own)

        at = gk + b * kb + place * ks + h * kh
        out = kv_out + (t * H + h) * (N + V)
        tl.store(out + n, tl.load(at + n, mask=own & (n < N)), mask=own & (n < N))
        of_all_heads += tl.sum(tl.load(at + N + r, mask=own, other=0.0).to(tl.float32), 0)[None, :]
        at = gv + b * vb + place * vs + h * vh
        tl.store(out + N + v, tl.load(at + v, mask=own & (v < V)), mask=own & (v < V))
    turned = _turn(of_all_heads, c, s)
    tl.store(rope_out + t * R + r, turned.to(rope_out.dtype.element_ty))


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


def _cudnn(q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BSHQ, k_BSHQ, v_BSHV))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out_BHSV = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out_BHSV.transpose(1, 2)


def _flash4(q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, scale: float) -> Tensor:
    """By its own function: torch's entry to it wants values padded to the keys' width."""
    from flash_attn.cute import flash_attn_func

    out_BSHV, _ = flash_attn_func(q_BSHQ, k_BSHQ, v_BSHV, softmax_scale=scale, causal=True)
    return out_BSHV


def _latent_attention(
    attend: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    q_BSHQ: Tensor,
    kv_BSHX: Tensor,
    k_rope_BSR: Tensor,
    cos_SP: Tensor,
    sin_SP: Tensor,
    scale: float,
) -> Tensor:
    if q_BSHQ.shape[1] == 1:  # a token that looks at nothing but itself; cuDNN refuses it
        return kv_BSHX[..., q_BSHQ.shape[-1] - k_rope_BSR.shape[-1] :]
    return attend(*_Assemble.apply(q_BSHQ, kv_BSHX, k_rope_BSR, cos_SP, sin_SP), scale)


latent_attention = partial(_latent_attention, _cudnn)
latent_attention_flash4 = partial(_latent_attention, _flash4)
