"""Who is told that it runs in Flower's simulation."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from federation import in_an_actor

from core.simulation import in_simulation


@pytest.mark.parametrize(("initialized", "actor"), [(False, None), (True, None)])
def test_a_device_whose_program_uses_ray_is_not_simulated(monkeypatch, initialized, actor):
    ray = ModuleType("ray")
    ray.is_initialized = lambda: initialized
    ray.get_runtime_context = lambda: SimpleNamespace(get_actor_id=lambda: actor)
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert not in_simulation()


def test_an_actor_of_rays_alone_is_simulated():
    assert not in_simulation()
    with in_an_actor():
        assert in_simulation()
    assert not in_simulation()
