"""Head and cross-entropy a chunk of tokens at a time: logits become their own gradient in place.

Forward computes the gradients too, so that no chunk's logits are kept: backward only scales them.

Shapes: T tokens, C tokens of a chunk, D hidden_size, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv2.kernels import HEAD_CHUNK

PROGRAMS, WARPS, BLOCK = 132, 32, 8192  # of the cross-entropy: one program a multiprocessor of a Hopper


@triton.jit
def _cross_entropy(logits, label_C, loss_C, scale, C, V, step, BLOCK: tl.constexpr):
    """Rows' losses; each row becomes scale * (softmax - onehot).

    No more programs than the L2 cache holds rows of, so that a row's second reading finds it there. A lane
    keeps the maximum and the sum of its own columns until the row's end, so that warps need not meet before.
    """
    for turn in range(0, tl.cdiv(C, tl.num_programs(0))):
        row = tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)
        live = row < C
        label = tl.load(label_C + row, mask=live, other=0)
        at = logits + row * step
        label_logit = tl.load(at + label, mask=live, other=0.0).to(tl.float32)
        highest = tl.full((BLOCK,), -1e30, tl.float32)  # a difference of infinities would be no number
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(at + v, mask=(v < V) & live, other=float("-inf")).to(tl.float32)
            new = tl.maximum(highest, x)
            total = total * tl.exp(highest - new) + tl.exp(x - new)
            highest = new
        peak = tl.max(highest, 0)
        log_sum = peak + tl.log(tl.sum(total * tl.exp(highest - peak), 0))
        tl.store(loss_C + row, log_sum - label_logit, mask=live)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(at + v, mask=(v < V) & live, other=0.0).to(tl.float32)
            grad = (tl.exp(x - log_sum) - tl.where(v == label, 1.0, 0.0)) * scale
            tl.store(at + v, grad.to(logits.dtype.element_ty), mask=(v < V) & live)


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
            rows, targets = len(hidden_CD), (labels_T[part], losses_T[part], 1.0 / tokens)
            sizes = (rows, vocab, logits_CV.stride(0), BLOCK)
            _cross_entropy[(min(rows, PROGRAMS),)](logits_CV, *targets, *sizes, num_warps=WARPS)
            torch.mm(logits_CV, weight_VD, out=grad_hidden[part])
            if tokens <= HEAD_CHUNK:
                grad_weight = torch.mm(logits_CV.t(), hidden_CD)
            elif grad_weight is None:  # several terms are added up in fp32
                grad_weight = torch.mm(logits_CV.t(), hidden_CD, out_dtype=torch.float32)
            else:
                kinds = {"out_dtype": torch.float32, "out": grad_weight}
                torch.addmm(grad_weight, logits_CV.t(), hidden_CD, **kinds)
            del logits_CV  # nothing else may hold them: the next chunk's take their place
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        return losses_T.mean()

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return _scaled(grad_hidden, grad), _scaled(grad_weight, grad), None


def head_loss(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    return _HeadLoss.apply(hidden_TD.contiguous(), weight_VD, labels_T)
