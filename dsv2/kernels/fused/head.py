"""Head and cross-entropy in chunks of tokens: logits become their own gradient in place.

The forward pass computes the gradients too, so that no chunk's logits are kept. The backward pass only scales
them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.specs import HEAD_CHUNK

BLOCK = 4096


@triton.jit
def _cross_entropy(logits, labels, losses, scale, vocab, row_step, BLOCK: tl.constexpr):
    """Compute a row's loss, and overwrite the row with scale * (softmax - onehot)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_step
    label = tl.load(labels + row)
    highest = float("-inf")
    total = 0.0
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        new = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(x - new), 0)
        highest = new
    log_sum = highest + tl.log(total)
    tl.store(losses + row, log_sum - tl.load(logits + label).to(tl.float32))
    tl.debug_barrier()
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        grad = (tl.exp(x - log_sum) - tl.where(column == label, 1.0, 0.0)) * scale
        tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=column < vocab)


@triton.jit
def _scale(x, factor, out, count, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + n, mask=n < count).to(tl.float32) * tl.load(factor)
    tl.store(out + n, value.to(out.dtype.element_ty), mask=n < count)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _scale[(triton.cdiv(x.numel(), BLOCK),)](x=x, factor=factor, out=out, count=x.numel(), BLOCK=BLOCK)
    return out


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD: Tensor, weight_vocab_D: Tensor, labels_T: Tensor) -> Tensor:
        tokens = len(hidden_TD)
        vocab = len(weight_vocab_D)
        losses_T = torch.empty(tokens, dtype=torch.float32, device=hidden_TD.device)
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_weight = None
        for start in range(0, tokens, HEAD_CHUNK):
            part = slice(start, min(start + HEAD_CHUNK, tokens))
            hidden = hidden_TD[part]
            logits = hidden @ weight_vocab_D.t()
            _cross_entropy[(len(hidden),)](
                logits=logits,
                labels=labels_T[part],
                losses=losses_T[part],
                scale=1.0 / tokens,
                vocab=vocab,
                row_step=vocab,
                BLOCK=BLOCK,
                num_warps=8,
            )
            torch.mm(logits, weight_vocab_D, out=grad_hidden_TD[part])
            if tokens <= HEAD_CHUNK:
                grad_weight = torch.mm(logits.t(), hidden)
            elif grad_weight is None:  # a sum over several chunks is kept in fp32
                grad_weight = torch.mm(logits.t(), hidden, out_dtype=torch.float32)
            else:
                torch.addmm(grad_weight, logits.t(), hidden, out_dtype=torch.float32, out=grad_weight)
            del logits  # before the next chunk's logits are allocated
        ctx.save_for_backward(grad_hidden_TD, grad_weight.to(weight_vocab_D.dtype))
        return losses_T.mean()

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden_TD, grad_weight = ctx.saved_tensors
        return _scaled(grad_hidden_TD, grad), _scaled(grad_weight, grad), None


def head_loss(hidden_TD: Tensor, weight_vocab_D: Tensor, labels_T: Tensor) -> Tensor:
    return _HeadLoss.apply(hidden_TD.contiguous(), weight_vocab_D, labels_T)
