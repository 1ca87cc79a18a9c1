"""Which steps and ranks may be profiled. tests/unit/training/test_start.py has the end of the run."""

import pytest

from dsv2.config.schema import Config, ProfileConfig
from dsv2.errors import UserError
from dsv2.training.validate import validate

TWO = "must be the first and the last step, such as [100,103]"
ORDER = "must be a first step, at least 1, and a last step that is not before it, such as [100,103]"
ONE_RANK = "must list 0; or null, for every rank"


@pytest.mark.parametrize(
    ("steps", "right"),
    [
        ([], TWO),
        ([100], TWO),
        ([1, 2, 3], TWO),
        ([103, 100], ORDER),
        ([0, 3], ORDER),
        ([-2, -1], ORDER),
        ([100, 103], "must end at stop_step=102 or earlier"),
    ],
)
def test_steps_that_are_refused(steps, right):
    with pytest.raises(UserError) as caught:
        validate(Config(profile=ProfileConfig(steps), stop_step=102), 1)
    assert str(caught.value) == f"profile.steps={steps}: {right}"


@pytest.mark.parametrize(
    ("ranks", "world_size", "right"),
    [
        ([], 1, ONE_RANK),
        ([1], 1, ONE_RANK),
        ([-1], 1, ONE_RANK),
        ([0, 2], 2, "must list ranks from 0 to 1, each once; or null, for every rank"),
        ([0, 0], 2, "must list ranks from 0 to 1, each once; or null, for every rank"),
    ],
)
def test_ranks_that_are_refused(ranks, world_size, right):
    with pytest.raises(UserError) as caught:
        validate(Config(profile=ProfileConfig(ranks=ranks)), world_size)
    assert str(caught.value) == f"profile.ranks={ranks}: {right}"


@pytest.mark.parametrize("profile", [ProfileConfig([7, 7], [1, 0]), ProfileConfig([1, 102], None)])
def test_what_is_allowed(profile):
    validate(Config(profile=profile, stop_step=102), 2)
