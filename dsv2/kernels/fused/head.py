"""Head and cross-entropy a chunk of tokens at a time: logits become their own gradient in place.

Forward computes the gradients too, so that no chunk's logits are kept: backward only scales them.

Shapes: T tokens, C tokens of a chunk, D hidden_size, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels.specs import HEAD_CHUNK


@triton.jit
def _cross_entropy(logits, label_C, loss_C, scale, V, step, BLOCK: tl.constexpr):
    """A row's loss; the row becomes scale * (softmax - onehot)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * step
    label = tl.load(label_C + row)
    highest, total = float("-inf"), 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(logits + v, mask=v < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(x - new), 0)
        highest = new
    log_sum = highest + tl.log(total)
    tl.store(loss_C + row, log_sum - tl.load(logits + label).to(tl.float32))
    tl.debug_barrier()
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(logits + v, mask=v < V, other=float("-inf")).to(tl.float32)
        grad = (tl.exp(x - log_sum) - tl.where(v == label, 1.0, 0.0)) * scale
        tl.store(logits + v, grad.to(logits.dtype.element_ty), mask=v < V)


@triton.jit
def _scale(x, factor, out, N, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + n, mask=n < N).to(tl.float32) * tl.load(factor)
    tl.store(out + n, value.to(out.dtype.element_ty), mask=n < N)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _scale[(triton.cdiv(x.numel(), 4096),)](x, factor, out, x.numel(), 4096)
    return out


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
        tokens, vocab = len(hidden_TD), len(weight_VD)
        losses_T = torch.empty(tokens, dtype=torch.float32, device=hidden_TD.device)
        grad_hidden, grad_weight = torch.empty_like(hidden_TD), None
        for start in range(0, tokens, HEAD_CHUNK):
            part = slice(start, min(start + HEAD_CHUNK, tokens))
            hidden_CD = hidden_TD[part]
            logits_CV = hidden_CD @ weight_VD.t()
            _cross_entropy[(len(hidden_CD),)](
                logits_CV, labels_T[part], losses_T[part], 1.0 / tokens, vocab, vocab, 4096, num_warps=8
            )
            torch.mm(logits_CV, weight_VD, out=grad_hidden[part])
            if tokens <= HEAD_CHUNK:
                grad_weight = torch.mm(logits_CV.t(), hidden_CD)
            elif grad_weight is None:  # several terms are added up in fp32
                grad_weight = torch.mm(logits_CV.t(), hidden_CD, out_dtype=torch.float32)
            else:
                torch.addmm(grad_weight, logits_CV.t(), hidden_CD, out_dtype=torch.float32, out=grad_weight)
            del logits_CV  # before the next chunk's are made
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        return losses_T.mean()

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return _scaled(grad_hidden, grad), _scaled(grad_weight, grad), None


def head_loss(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    return _HeadLoss.apply(hidden_TD.contiguous(), weight_VD, labels_T)
