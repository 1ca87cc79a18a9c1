"""MLA: one pass that builds queries, keys and values, then cuDNN's attention or FlashAttention-4."""

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
def _rotate(x, cos, sin):
    """Rotate each interleaved pair of columns by its angle, in fp32."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)


@triton.jit
def _join(
    q,
    kv,
    k_rope,
    cos,
    sin,
    q_out,
    k_out,
    S,
    H,
    k_rope_step,
    N: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    N_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Rotate the queries' rotary part, and join both parts of the keys."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    n = tl.arange(0, N_BLOCK)[None, :]
    r = tl.arange(0, R)[None, :]
    angle = (t % S) * (R // 2) + tl.arange(0, R // 2)[None, :]
    c = tl.load(cos + angle)
    s = tl.load(sin + angle)

    inside = (h < H) & (n < N)
    row = (t * H + h) * (N + R)
    tl.store(q_out + row + n, tl.load(q + row + n, mask=inside), mask=inside)
    rotated = _rotate(tl.load(q + row + N + r, mask=h < H, other=0.0), c, s)
    tl.store(q_out + row + N + r, rotated.to(q_out.dtype.element_ty), mask=h < H)

    nope = tl.load(kv + (t * H + h) * (N + V) + n, mask=inside)
    tl.store(k_out + row + n, nope, mask=inside)
    rotated = _rotate(tl.load(k_rope + t * k_rope_step + r), c, s)
    of_every_head = tl.broadcast_to(rotated, (HEADS, R))
    tl.store(k_out + row + N + r, of_every_head.to(k_out.dtype.element_ty), mask=h < H)


@triton.jit
def _split_gradients(
    grad_q,
    grad_k,
    grad_v,
    cos,
    sin,
    q_out,
    kv_out,
    k_rope_out,
    S,
    H,
    q_batch,
    q_position,
    q_head,
    k_batch,
    k_position,
    k_head,
    v_batch,
    v_position,
    v_head,
    N: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    N_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Compute the gradients of `_join`'s inputs."""
    t = tl.program_id(0).to(tl.int64)
    b = t // S
    position = t % S
    angle = position * (R // 2) + tl.arange(0, R // 2)[None, :]
    c = tl.load(cos + angle)
    s = -tl.load(sin + angle)
    of_all_heads = tl.zeros((1, R), tl.float32)
    n = tl.arange(0, N_BLOCK)[None, :]
    r = tl.arange(0, R)[None, :]
    v = tl.arange(0, V_BLOCK)[None, :]
    for start in range(0, H, HEADS):
        h = (start + tl.arange(0, HEADS)[:, None]).to(tl.int64)
        live = h < H
        at = grad_q + b * q_batch + position * q_position + h * q_head
        out = q_out + (t * H + h) * (N + R)
        tl.store(out + n, tl.load(at + n, mask=live & (n < N)), mask=live & (n < N))
        rotated = _rotate(tl.load(at + N + r, mask=live, other=0.0), c, s)
        tl.store(out + N + r, rotated.to(q_out.dtype.element_ty), mask=live)

        at = grad_k + b * k_batch + position * k_position + h * k_head
        out = kv_out + (t * H + h) * (N + V)
        tl.store(out + n, tl.load(at + n, mask=live & (n < N)), mask=live & (n < N))
        of_all_heads += tl.sum(tl.load(at + N + r, mask=live, other=0.0).to(tl.float32), 0)[None, :]
        at = grad_v + b * v_batch + position * v_position + h * v_head
        tl.store(out + N + v, tl.load(at + v, mask=live & (v < V)), mask=live & (v < V))
    rotated = _rotate(of_all_heads, c, s)
    tl.store(k_rope_out + t * R + r, rotated.to(k_rope_out.dtype.element_ty))


def _strides_of(**tensors: Tensor) -> dict[str, int]:
    """Return the strides of [B, S, H, width] tensors: for one named q, `q_batch`, `q_position`, `q_head`."""
    strides: dict[str, int] = {}
    for name, tensor in tensors.items():
        batch, position, head, _ = tensor.stride()
        strides |= {f"{name}_batch": batch, f"{name}_position": position, f"{name}_head": head}
    return strides


class _Join(torch.autograd.Function):
    """Return (rotated queries, keys, values); the values are a view of kv."""

    @staticmethod
    def forward(ctx, q_BSHQ, kv, k_rope_BSR, cos_SA, sin_SA):
        batch, length, heads, width = q_BSHQ.shape
        rope = k_rope_BSR.shape[-1]
        nope = width - rope
        v_dim = kv.shape[-1] - nope
        assert q_BSHQ.is_contiguous()
        assert kv.is_contiguous()
        rotated_BSHQ = torch.empty_like(q_BSHQ)
        k_BSHQ = torch.empty_like(q_BSHQ)
        _join[(batch * length, triton.cdiv(heads, HEADS))](
            q=q_BSHQ,
            kv=kv,
            k_rope=k_rope_BSR,
            cos=cos_SA,
            sin=sin_SA,
            q_out=rotated_BSHQ,
            k_out=k_BSHQ,
            S=length,
            H=heads,
            k_rope_step=k_rope_BSR.stride(1),
            N=nope,
            R=rope,
            V=v_dim,
            N_BLOCK=triton.next_power_of_2(nope),
            HEADS=HEADS,
        )
        ctx.save_for_backward(cos_SA, sin_SA)
        ctx.sizes = (batch, length, heads, nope, rope, v_dim)
        return rotated_BSHQ, k_BSHQ, kv[..., nope:]

    @staticmethod
    def backward(ctx, grad_q, grad_k, grad_v):
        batch, length, heads, nope, rope, v_dim = ctx.sizes
        cos_SA, sin_SA = ctx.saved_tensors
        q_out = grad_q.new_empty(batch, length, heads, nope + rope)
        kv_out = grad_q.new_empty(batch, length, heads, nope + v_dim)
        k_rope_out = grad_q.new_empty(batch, length, rope)
        _split_gradients[(batch * length,)](
            grad_q=grad_q,
            grad_k=grad_k,
            grad_v=grad_v,
            cos=cos_SA,
            sin=sin_SA,
            q_out=q_out,
            kv_out=kv_out,
            k_rope_out=k_rope_out,
            S=length,
            H=heads,
            **_strides_of(q=grad_q, k=grad_k, v=grad_v),
            N=nope,
            R=rope,
            V=v_dim,
            N_BLOCK=triton.next_power_of_2(nope),
            V_BLOCK=triton.next_power_of_2(v_dim),
            HEADS=HEADS,
        )
        return q_out, kv_out, k_rope_out, None, None


def _cudnn(q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BSHQ, k_BSHQ, v_BSHV))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out_BHSV = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out_BHSV.transpose(1, 2)


def _flash4(q_BSHQ: Tensor, k_BSHQ: Tensor, v_BSHV: Tensor, scale: float) -> Tensor:
    """Call FlashAttention-4 directly: torch's own call of it needs values padded to the keys' width."""
    from flash_attn.cute import flash_attn_func

    out_BSHV, _ = flash_attn_func(q_BSHQ, k_BSHQ, v_BSHV, softmax_scale=scale, causal=True)
    return out_BSHV


def _latent_attention(
    attend: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    q_BSHQ: Tensor,
    kv: Tensor,
    k_rope_BSR: Tensor,
    cos_SA: Tensor,
    sin_SA: Tensor,
    *,
    scale: float,
) -> Tensor:
    if q_BSHQ.shape[1] == 1:  # a single token sees only itself, and cuDNN refuses a single token
        return kv[..., q_BSHQ.shape[-1] - k_rope_BSR.shape[-1] :]
    q, k, v = _Join.apply(q_BSHQ, kv, k_rope_BSR, cos_SA, sin_SA)
    return attend(q, k, v, scale)


latent_attention = partial(_latent_attention, _cudnn)
latent_attention_flash4 = partial(_latent_attention, _flash4)
