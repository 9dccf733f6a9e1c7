"""Names and their spellings."""

from __future__ import annotations

import pytest

from difftool.errors import UsageError
from difftool.registry import Registry


@pytest.fixture
def samplers() -> Registry[int]:
    registry: Registry[int] = Registry("sampler")
    registry.add("dpmpp_2m", 1, "DPMSolverMultistepScheduler")
    registry.add("euler_a", 2, "euler ancestral")
    return registry


@pytest.mark.parametrize("name", ["dpmpp_2m", "DPM++ 2M", "dpm++2m", "dpmsolvermultistepscheduler"])
def test_other_spellings_resolve(samplers, name):
    assert samplers.resolve(name) == "dpmpp_2m"
    assert samplers[name] == 1
    assert name in samplers


def test_an_unknown_name_names_the_nearest(samplers):
    with pytest.raises(UsageError, match='there is no sampler "dpmpp_2mm"') as caught:
        samplers["dpmpp_2mm"]
    assert 'did you mean "dpmpp_2m"' in str(caught.value)


def test_a_spelling_means_one_thing(samplers):
    with pytest.raises(ValueError, match="registered twice"):
        samplers.add("euler", 3, "Euler_A")
    with pytest.raises(ValueError, match="registered twice"):
        samplers.add("dpmpp_2m", 3)


def test_names_are_listed_in_the_order_of_registration(samplers):
    assert list(samplers) == ["dpmpp_2m", "euler_a"]
