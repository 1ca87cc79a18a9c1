"""Any override is accepted or refused in one line, quickly: nothing hangs, and nothing is a traceback."""

import copy
import time

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, open_dict

from dsv2.config import compose as compose_module
from dsv2.config.fields import GROUPS, field_types, options_of
from dsv2.errors import UserError
from dsv2.training.validate import validate
from tests.unit.helpers import compose_config

EXAMPLES = 500
CPU_SECONDS = 5  # of one override
FIELDS = sorted(field_types())
WORDS = ["", "null", "true", "x", "a b", "a,b", "[1", "[]", "{}", "{a:1}", "${seed}", "${nowhere}", "'", "ü"]
WORDS += ["nan", "inf", "-inf", "1e300", "1e-300", "-0.0", "1e23", "0x10", "10_000", "auto", "fp32", "bf16"]
INTEGERS = st.integers(-3, 70) | st.sampled_from([10**power for power in (3, 4, 5, 6, 9, 12, 18, 23, 40)])
VALUES = (
    st.sampled_from(WORDS)
    | INTEGERS.map(str)
    | st.floats().map(str)
    | st.integers(1, 17).map(lambda n: str(2**n))
)


@pytest.fixture(scope="module")
def quick_compose():
    """Compose conf/ once, which takes 0.3 s. Hydra itself then applies overrides of fields."""
    composed = compose_module.compose_overrides([])
    whole_compose = compose_module.compose

    def compose(name: str, overrides: list[str]) -> DictConfig:
        parsed = OverridesParser.create().parse_overrides(overrides)
        if any(override.key_or_group in GROUPS for override in parsed):
            return whole_compose(name, overrides)
        config = copy.deepcopy(composed)
        with open_dict(config):
            config.hydra = {}
        try:
            ConfigLoaderImpl._apply_overrides_to_config(parsed, config)
        finally:
            with open_dict(config):
                del config["hydra"]
        return config

    patch = pytest.MonkeyPatch()
    patch.setattr(compose_module, "compose", compose)
    patch.setattr(compose_module, "register_schema", lambda: None)
    yield
    patch.undo()


def check(overrides: list[str], world_size: int) -> str | None:
    """Return the refusal, or None; raise whatever is no refusal."""
    try:
        validate(compose_config(*overrides), world_size)
    except UserError as error:
        return str(error)
    return None


def assert_told_at_once(overrides: list[str], world_size: int) -> None:
    start = time.process_time()
    refusal = check(overrides, world_size)
    assert time.process_time() - start < CPU_SECONDS, overrides
    assert refusal is None or (refusal and "\n" not in refusal), overrides


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    field=st.sampled_from(FIELDS),
    value=VALUES,
    prefix=st.sampled_from(["", "", "", "", "+", "++", "~"]),
    processes=st.sampled_from([1, 2, 3, 8]),
)
def test_any_value_of_any_field(quick_compose, field, value, prefix, processes):
    assert_told_at_once([f"{prefix}{field}={value}"], processes)


@pytest.mark.parametrize("group", GROUPS)
def test_any_choice_of_a_group(group):
    for choice in (f"{group}=nowhere", f"{group}=", f"~{group}", f"+{group}={options_of(group)[0]}"):
        assert_told_at_once([choice], 1)
