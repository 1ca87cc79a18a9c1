"""Every fused operation against the reference in fp64, forward and backward, at odd shapes."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dsv2.kernels.base import KernelSet
from dsv2.kernels.sets import REFERENCE
from dsv2.kernels.types import AdamWStep
from tests.gpu.process import FUSED_KERNELS, kernel_set

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(scope="module")
def fused() -> KernelSet:
    return kernel_set("fused")


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device=DEVICE) * scale).bfloat16()


def run(function: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """The result and the gradient of every tensor; in their own precision, or in `dtype`."""
    inputs = [(t if dtype is None else t.to(dtype)).detach().clone().requires_grad_() for t in tensors]
    out = function(*inputs)
    readout = torch.linspace(-1, 1, out.numel(), device=DEVICE, dtype=torch.float64).view(out.shape)
    (out * readout.to(out.dtype)).sum().backward()
    return [out.detach(), *(t.grad for t in inputs)]


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


def check(reference: Callable, fused: Callable, tensors: list[Tensor], bound: float = 6e-3) -> None:
    """As near to fp64 as bf16 allows, and no further than 1.5 times the reference in bf16."""
    exact, plain, got = (
        run(f, tensors, d) for f, d in ((reference, torch.float64), (reference, None), (fused, None))
    )
    for index, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
        assert g.shape == e.shape
        assert torch.isfinite(g).all(), index
        error = relative(g, e)
        print(f"{index}: error {error:.2e}, reference's {relative(p, e):.2e}")
        assert error < bound, (index, error)
        assert error < 1.5 * relative(p, e) + 2e-3, (index, error)


def choices(rows: int, top_k: int, experts: int, kind: str) -> Tensor:
    """Experts of each row: even, skewed (one takes five times its share), some absent, one empty, or none."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    weights = torch.ones(rows, experts, device=DEVICE)
    if kind == "skewed":
        weights[:, 0] *= 5
    if kind == "empty":
        weights[:, 1] = 0
    ids = torch.multinomial(weights, top_k, generator=generator)
    if kind == "absent":
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator, device=DEVICE) < 0.4, -1)
    return torch.full_like(ids, -1) if kind == "none" else ids


@pytest.fixture
def poison() -> Iterator[None]:
    """New memory holds NaNs: rows that belong to nobody must not be read."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@FUSED_KERNELS
@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("kind", ["even", "skewed", "empty", "absent", "none"])
@pytest.mark.parametrize(
    ("rows", "top_k", "experts", "hidden", "width"),
    [(1, 2, 4, 64, 32), (37, 3, 8, 72, 40), (37, 3, 8, 256, 96), (1000, 6, 64, 2048, 1408)],
)
def test_routed_experts(poison, kernels, rows, top_k, experts, hidden, width, kind):
    fused = kernel_set(kernels)
    ids = choices(rows, top_k, experts, kind)
    counts = torch.stack([(ids == e).sum() for e in range(experts)])
    w13, w2 = (
        normal(experts, 2 * width, hidden, seed=2, scale=0.05),
        normal(experts, hidden, width, seed=3, scale=0.05),
    )
    weights = torch.rand(rows, top_k, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(4))

    def apply(kernels: KernelSet, n_pairs: int) -> Callable[..., Tensor]:
        return lambda x, w, a, b: kernels.routed_experts(
            x, ids, w, counts, n_pairs=n_pairs, first_expert=0, w13_E2FD=a, w2_EDF=b
        )

    for n_pairs in {ids.numel(), int(counts.sum())}:
        check(apply(REFERENCE, n_pairs), apply(fused, n_pairs), [normal(rows, hidden), weights, w13, w2])


@FUSED_KERNELS
def test_experts_without_a_row(kernels):
    """Zeros, and gradients that are zeros and not missing."""
    shapes = ((0, 64), (0, 3), (4, 64, 64), (4, 64, 32))
    x, weights, w13, w2 = (torch.ones(shape, device=DEVICE, requires_grad=True) for shape in shapes)
    ids, counts = torch.empty(0, 3, dtype=torch.int64, device=DEVICE), torch.zeros(4, device=DEVICE).long()
    out = kernel_set(kernels).routed_experts(
        x, ids, weights, counts, n_pairs=0, first_expert=0, w13_E2FD=w13, w2_EDF=w2
    )
    out.sum().backward()
    assert out.shape == x.shape
    assert all(t.grad is not None and not t.grad.any() for t in (x, weights, w13, w2))


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize(
    ("tokens", "slots", "keys"), [(0, 3, 4), (1, 1, 1), (37, 3, 5), (1000, 6, 160), (700, 8, 255)]
)
def test_sort_of_slots(fused, tokens, slots, keys, absent):
    """Stable; an empty key, a key that all have, absent slots within or beyond the rows asked for."""
    from dsv2.kernels.fused.rows import sort_slots
    from dsv2.kernels.reference.rows import map_rows

    generator = torch.Generator(DEVICE).manual_seed(0)
    some = torch.randint(0, keys + absent, (tokens, slots), device=DEVICE, generator=generator)
    for key in (some, some.where(some != 1, 0), torch.full_like(some, keys - 1)):
        present = int((key < keys).sum())
        for n_rows in {present, key.numel()}:
            want = map_rows(key, n_rows)
            # Absent keys lie above the others, or below the first of them.
            below = (key.where(key < keys, -1) + 7).float()
            for some_keys, first in ((key.to(torch.int16), 0), (below, 7)):
                rows, ends = sort_slots(some_keys, first, keys, n_rows)
                assert torch.equal(rows.slots, want.slots)
                assert ends.tolist() == [int((key <= k).sum()) for k in range(keys)]
                assert rows.places.flatten()[want.slots[:present]].tolist() == list(range(present))
                assert (rows.places[key == keys] == -1).all()


@pytest.mark.parametrize("kind", ["even", "absent", "none"])
@pytest.mark.parametrize(
    ("tokens", "top_k", "local", "ranks"), [(1, 2, 2, 2), (37, 3, 2, 4), (1000, 6, 16, 4), (700, 6, 20, 8)]
)
def test_rows_by_rank(fused, tokens, top_k, local, ranks, kind):
    ids = choices(tokens, top_k, local * ranks, kind)
    want, want_counts = REFERENCE.rows_by_rank(ids, local, ranks)
    rows, counts = fused.rows_by_rank(ids, local, ranks)
    present = int(counts.sum())
    assert counts.tolist() == want_counts.tolist()
    assert torch.equal(rows.slots[:present], want.slots[:present])
    assert torch.equal(rows.places, want.places)


@pytest.mark.parametrize(("tokens", "slots"), [(1, 1), (37, 3), (3000, 6)])
def test_pick(fused, tokens, slots):
    from dsv2.kernels.fused.rows import pick

    generator = torch.Generator(DEVICE).manual_seed(0)
    values = torch.rand(50, device=DEVICE, generator=generator)
    places = torch.randint(-1, 50, (tokens, slots), device=DEVICE, generator=generator)
    want = values[places.clamp(min=0)].where(places >= 0, 0.0)
    assert torch.equal(pick(values, places.int()), want)


@pytest.mark.parametrize(("tokens", "slots", "width"), [(1, 1, 8), (50, 4, 100), (333, 8, 5120)])
def test_rows(fused, tokens, slots, width):
    from dsv2.kernels.reference.rows import map_rows

    generator = torch.Generator(DEVICE).manual_seed(0)
    keys = torch.randint(0, 5, (tokens, slots), device=DEVICE, generator=generator)
    rows = map_rows(keys, max(1, int((keys < 4).sum())))
    rows = rows._replace(places=rows.places.where(keys < 4, -1))
    x = normal(tokens, width)
    assert torch.equal(fused.copy_rows(x, rows), REFERENCE.copy_rows(x, rows))
    for y in (normal(len(rows.slots), width), normal(len(rows.slots), width).float()):
        exact = REFERENCE.sum_rows(y.double(), rows, tokens)
        assert relative(fused.sum_rows(y, rows, tokens), exact) < (
            3e-3 if y.dtype == torch.bfloat16 else 1e-6
        )


@pytest.mark.parametrize(
    ("lead", "hidden", "width"), [((1,), 16, 8), ((3, 5), 64, 104), ((2, 65), 256, 2816)]
)
def test_swiglu(fused, lead, hidden, width):
    gate, up = normal(width, hidden, seed=1, scale=0.1), normal(width, hidden, seed=2, scale=0.1)
    tensors = [normal(*lead, hidden), gate, up, normal(hidden, width, seed=3, scale=0.1)]
    check(REFERENCE.swiglu, fused.swiglu, tensors, bound=1e-2)


@pytest.mark.parametrize(("lead", "hidden"), [((1,), 16), ((3, 5), 64), ((2, 65), 256)])
def test_linears(fused, lead, hidden):
    weights = [normal(width, hidden, seed=width) for width in (24, 8, 96)]

    def joined(kernels: KernelSet) -> Callable[..., Tensor]:
        return lambda x, *w: torch.cat(kernels.linears(x, *w), dim=-1)

    check(joined(REFERENCE), joined(fused), [normal(*lead, hidden), *weights])


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (37, 100), (2500, 512), (3, 5120)])
def test_norms(fused, rows, width):
    weight, wide = 1 + normal(width, seed=1, scale=0.3), normal(rows, width + 24)
    check(
        lambda x, w: REFERENCE.rms_norm(x[:, :width], w, 1e-6),
        lambda x, w: fused.rms_norm(x[:, :width], w, 1e-6),  # of strided rows
        [wide, weight],
    )
    x, change = normal(2, rows, width, seed=2), normal(2, rows, width, seed=3)

    def both(kernels: KernelSet) -> Callable[..., Tensor]:
        return lambda x, c, w: torch.cat(kernels.add_rms_norm(x, c, w, 1e-6))

    def alone(kernels: KernelSet) -> Callable[..., Tensor]:
        return lambda x, w: torch.cat(kernels.add_rms_norm(x, None, w, 1e-6))

    check(both(REFERENCE), both(fused), [x, change, weight])
    check(alone(REFERENCE), alone(fused), [x, weight])
    check(REFERENCE.add_up, fused.add_up, [x, change, normal(2, rows, width, seed=4)])


LIMITS = [
    (8, 1, 1, 2),
    (64, 1, 1, 6),
    (160, 8, 3, 6),
    (12, 4, 2, 3),
    (6, 3, 1, 2),
    (7, 7, 5, 5),
    (5, 1, 1, 5),
]


@pytest.mark.parametrize(("experts", "n_group", "topk_group", "top_k"), LIMITS)
@pytest.mark.parametrize("tokens", [1, 333])
def test_route_chooses_as_the_reference(fused, tokens, experts, n_group, topk_group, top_k):
    """Logits on a coarse grid, so that many are equal; and one so high that all others underflow to 0."""
    x = (normal(tokens, experts) * 2).round() / 2
    x[0, experts // 2] = 200
    centroids, limits = torch.eye(experts, device=DEVICE, dtype=torch.bfloat16), (top_k, n_group, topk_group)
    want, got = (kernels.route(x, centroids, *limits) for kernels in (REFERENCE, fused))
    assert torch.equal(got.expert_ids_TK, want.expert_ids_TK)
    torch.testing.assert_close(got.affinity_TE, want.affinity_TE, rtol=2e-6, atol=1e-12)
    assert torch.equal(got.affinity_TK, got.affinity_TE.gather(1, got.expert_ids_TK))


def test_route_survives_nan(fused):
    x = normal(20, 64)
    x[3] = float("nan")
    routing = fused.route(x, normal(20, 64, seed=1), 3, 4, 2)
    assert ((routing.expert_ids_TK >= 0) & (routing.expert_ids_TK < 20)).all()
    assert routing.affinity_TE[3].isnan().all()


@pytest.mark.parametrize(("experts", "n_group", "topk_group", "top_k"), LIMITS)
@pytest.mark.parametrize(("n_sequences", "length"), [(1, 1), (3, 111)])
def test_router_and_sums(fused, n_sequences, length, experts, n_group, topk_group, top_k):
    """Affinities, and through them gradients, of weights and of sums over sequences."""
    limits = (top_k, n_group, topk_group)
    tensors = [normal(n_sequences * length, 256), normal(experts, 256, seed=1, scale=0.1)]
    chosen = REFERENCE.route(*tensors, *limits)
    gap = chosen.affinity_TE.sort(dim=1).values.diff(dim=1).amin(dim=1)
    tensors[0] = tensors[0] * (gap > 1e-6).unsqueeze(1)  # no choice hangs on the order of a sum
    sums = []

    def weights_and_sums(kernels: KernelSet) -> Callable[..., Tensor]:
        def apply(x: Tensor, centroids: Tensor) -> Tensor:
            routing = kernels.route(x, centroids, *limits)
            sums.append(kernels.sequence_sums(routing, n_sequences, n_group))
            return torch.cat((routing.affinity_TK.flatten(), sums[-1].affinity_BE.flatten() * experts))

        return apply

    check(weights_and_sums(REFERENCE), weights_and_sums(fused), tensors)
    exact, _, got = sums
    for name, want, value in zip(exact._fields, exact, got, strict=True):
        if name in ("selected_BE", "sent_BG"):
            assert torch.equal(value.double(), want.double()), name
        else:
            torch.testing.assert_close(value.double(), want.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "hidden", "vocab"), [(1, 64, 1000), (33, 128, 5003), (9000, 256, 4096)])
@pytest.mark.parametrize("chunk", [4096, 16384])
def test_head_loss(fused, monkeypatch, tokens, hidden, vocab, chunk):
    from dsv2.kernels.fused import head

    monkeypatch.setattr(head, "HEAD_CHUNK", chunk)
    labels = torch.randint(
        0, vocab, (tokens,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)
    )
    tensors = [normal(tokens, hidden), normal(vocab, hidden, seed=1, scale=0.2)]
    check(
        lambda x, w: REFERENCE.head_loss(x, w, labels),
        lambda x, w: fused.head_loss(x, w, labels),
        tensors,
        bound=1e-2,
    )


@pytest.mark.parametrize(
    ("batch", "length", "heads", "nope", "rope", "v_dim"),
    [(2, 64, 4, 32, 16, 32), (1, 257, 3, 128, 64, 128), (2, 1000, 16, 128, 64, 128)],
)
@FUSED_KERNELS
def test_latent_attention(kernels, batch, length, heads, nope, rope, v_dim):
    from dsv2.model.rope import rope_tables

    fused = kernel_set(kernels)
    cos, sin = rope_tables(torch.arange(length, device=DEVICE), rope, 10000.0)
    scale = (nope + rope) ** -0.5
    q = normal(batch, length, heads, nope + rope)
    kv = normal(batch, length, heads, nope + v_dim, seed=1)
    latent_and_rope = normal(batch, length, 40 + rope, seed=2)

    def apply(kernels: KernelSet) -> Callable[..., Tensor]:
        return lambda q, kv, c: kernels.latent_attention(q, kv, c[..., 40:], cos, sin, scale=scale)

    check(apply(REFERENCE), apply(fused), [q, kv, latent_and_rope], bound=1e-2)


@FUSED_KERNELS
def test_attention_of_one_token_is_its_value(kernels):
    """A sample begins with one."""
    from dsv2.model.rope import rope_tables

    cos, sin = rope_tables(torch.arange(1, device=DEVICE), 16, 10000.0)
    q, kv, k_rope = normal(2, 1, 4, 48), normal(2, 1, 4, 64, seed=1), normal(2, 1, 16, seed=2)
    assert torch.equal(kernel_set(kernels).latent_attention(q, kv, k_rope, cos, sin, scale=0.1), kv[..., 32:])


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 1000, 3_000_001])
def test_adamw(fused, states, gradient, count):
    """The reference's weights, moments and rounding, but for the last bit of its fp32 arithmetic."""
    hyper = AdamWStep(lr=3e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3, seed=11)
    start = [
        normal(count).to(states),
        normal(count, seed=1).to(states),
        normal(count, seed=2).abs().to(states),
    ]
    grad, separate = normal(count, seed=3).to(gradient), states == torch.float32
    results = []
    for kernels in (REFERENCE, fused):
        tensors = [x.clone() for x in start]
        weight = torch.zeros(count, dtype=torch.bfloat16, device=DEVICE) if separate else None
        for scale in (0.7, float("nan")):  # the second changes nothing
            factor = torch.tensor(scale, device=DEVICE)
            kernels.adamw(*tensors, grad, scale=factor, weight=weight, hyper=hyper, first=2**32 + 5)
        results.append([*tensors, *([weight] if separate else [])])
    for want, got, before in zip(*results, [*start, start[0] * 0], strict=False):
        assert not torch.equal(want, before)
        if want.dtype == torch.float32:
            torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-7)
        else:
            assert (got != want).float().mean().item() < 2e-3
            torch.testing.assert_close(got, want, rtol=2**-7, atol=0)


@pytest.mark.parametrize("counts", [(1,), (5, 0, 3000), (5_000_001, 7)])
def test_sum_of_squares(fused, counts):
    tensors = [normal(count, seed=count) for count in counts]
    exact = sum(x.double().square().sum().item() for x in tensors)
    assert fused.sum_of_squares(tensors).item() == pytest.approx(exact, rel=1e-6)
    assert fused.sum_of_squares([x.float() for x in tensors]).item() == pytest.approx(exact, rel=1e-6)
    assert torch.isnan(fused.sum_of_squares([*tensors, tensors[0] * float("nan")]))
