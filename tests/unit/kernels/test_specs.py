"""Which sizes and precisions the fused kernels are refused with."""

from dataclasses import replace

import pytest

from dsv2.config.schema import Config, Precision, RuntimeConfig
from dsv2.errors import UserError
from dsv2.kernels.sets import BUILDERS, REFERENCE, load_kernels
from dsv2.kernels.specs import SPECS
from dsv2.training.validate import validate

FUSED = "fused"
CUTE = "fused_cute"
KEYS, EIGHT = "qk_nope_head_dim + qk_rope_head_dim", "a multiple of 8"
PUBLISHED = "at most 128, or 192 beside model.v_head_dim=128,"


def config(kernels: str, precision: Precision = Precision.bf16, **model: object) -> Config:
    runtime = RuntimeConfig(kernels=kernels, precision=precision)
    return Config(model=replace(Config().model, **model), runtime=runtime)


@pytest.mark.parametrize("kernels", [FUSED, CUTE])
def test_they_are_for_bf16(kernels):
    with pytest.raises(UserError) as refusal:
        validate(config(kernels, Precision.fp32), 1)
    assert str(refusal.value) == f"runtime.kernels={kernels}: needs runtime.precision=bf16; or use reference"


@pytest.mark.parametrize(
    ("kernels", "name", "value", "right"),
    [
        (FUSED, "qk_rope_head_dim", 12, "a power of 2"),
        (CUTE, "qk_rope_head_dim", 12, "a power of 2"),
        (FUSED, "moe_intermediate_size", 44, EIGHT),
        (CUTE, "hidden_size", 44, EIGHT),
        (FUSED, "v_head_dim", 12, EIGHT),
        (CUTE, "v_head_dim", 12, EIGHT),
        (FUSED, KEYS, 160, PUBLISHED),
        (FUSED, "v_head_dim", 192, PUBLISHED),
        (CUTE, KEYS, 264, "at most 256"),
    ],
)
def test_widths_that_they_do_not_take(kernels, name, value, right):
    given = value - Config().model.qk_rope_head_dim if name == KEYS else value
    with pytest.raises(UserError) as refusal:
        validate(config(kernels, **{name.split()[0]: given}), 1)
    wrong = f"model.{name}={value}: must be {right} with runtime.kernels={kernels}; or use reference"
    assert str(refusal.value) == wrong


@pytest.mark.parametrize(
    ("kernels", "nope", "rope", "value"),
    [(FUSED, 128, 64, 128), (FUSED, 64, 64, 128), (CUTE, 128, 64, 128), (CUTE, 96, 64, 256)],
)
def test_widths_that_they_take(kernels, nope, rope, value):
    widths = {"qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": value}
    validate(config(kernels, **widths), 1)


def test_other_attention_is_torchs_own():
    widths = {"qk_nope_head_dim": 180, "v_head_dim": 180, "qk_rope_head_dim": 12}
    validate(config(FUSED, attention="mha", **widths), 1)


def test_an_unknown_set_is_refused_with_the_known_ones():
    with pytest.raises(UserError) as refusal:
        validate(config("fuzed"), 1)
    assert str(refusal.value) == "runtime.kernels=fuzed: must be one of reference, fused, fused_cute"


def test_every_spec_has_its_set():
    assert list(SPECS) == list(BUILDERS)
    assert load_kernels("reference") is REFERENCE
