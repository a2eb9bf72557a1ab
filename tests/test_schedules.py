"""Schedules are functions of the update count, with the reference values of DINO's."""

import pytest

from dinoct.config import DinoConfig, OptimConfig
from dinoct.schedules import Schedules, cosine, linear


@pytest.mark.parametrize(
    ("step", "value"), [(0, 0), (9, 1e-3), (10, 1e-3), (55, 5.005e-4), (99, 1.3042819e-6), (100, 1e-6), (5000, 1e-6)]
)
def test_cosine_with_warmup_reference(step, value):
    assert cosine(step, horizon=100, start=1e-3, end=1e-6, warmup=10) == pytest.approx(value, rel=1e-6)


def test_a_run_of_one_step_has_a_learning_rate():
    assert Schedules(OptimConfig(lr=1e-3), DinoConfig(), horizon=1).lr(0) == 1e-3


def test_linear_reaches_its_end():
    assert [linear(s, length=2, start=0.0, end=1.0) for s in (0, 1, 2, 9)] == [0.0, 0.5, 1.0, 1.0]


def test_momentum_and_temperature_move_towards_their_ends():
    s = Schedules(OptimConfig(), DinoConfig(), horizon=100)
    assert s.teacher_momentum(0) == pytest.approx(0.994)
    assert s.teacher_momentum(100) == 1.0
    assert (s.teacher_temperature(0), s.teacher_temperature(30)) == (0.04, 0.07)
    assert s.last_layer_frozen(0)
    assert not s.last_layer_frozen(1)
