"""Sampling, turns and statistics, on a clock that runs as it is told."""

from __future__ import annotations

import pytest

from benchmarks import timing


class Machine:
    """A clock, and work that takes seconds on it; with `slowing`, every second makes the next one longer."""

    def __init__(self, slowing: float = 0.0):
        self.time = 0.0
        self.slowing = slowing
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.time

    def work(self, name: str, seconds: float):
        def run() -> None:
            self.log.append(name)
            self.time += seconds * (1.0 + self.slowing * self.time)

        return run

    def sample(self, name: str, seconds: float) -> timing.Sample:
        return timing.wall_sampler(self.work(name, seconds), self)


def test_a_sample_is_the_time_of_all_its_loops():
    machine = Machine()
    assert machine.sample("a", 0.5)(4) == 2.0
    assert machine.log == ["a"] * 4


@pytest.mark.parametrize("seconds", [1e-7, 3e-5, 0.004, 0.02, 7.0])
def test_samples_are_long_enough_and_not_much_longer(seconds):
    machine = Machine()
    loops = timing.calibrate(machine.sample("a", seconds), shortest=0.01)
    assert loops * seconds >= 0.01 * (1 - 1e-9)
    assert loops == 1 or loops * seconds <= 0.03


def test_calibration_warms_up_first():
    machine = Machine()
    times = iter([5.0])  # only the first call is slow

    def run() -> None:
        machine.time += next(times, 0.001)

    assert timing.calibrate(timing.wall_sampler(run, machine), shortest=0.01) >= 10


def test_every_round_takes_everyone_once_in_rotated_order():
    machine = Machine()
    samples = {name: (machine.sample(name, 1.0), 1) for name in "abc"}
    seconds = timing.interleave(samples, rounds=4)
    assert "".join(machine.log) == "aabbccbcacababc"
    assert seconds == {name: [1.0] * 4 for name in "abc"}


def test_a_short_sample_is_preceded_by_a_call_that_does_not_count():
    machine = Machine()
    samples = {"a": (machine.sample("a", 0.01), 2), "b": (machine.sample("b", 0.06), 2)}
    seconds = timing.interleave(samples, rounds=2)
    assert "".join(machine.log) == "aaabbbbbaaa"
    assert seconds == {"a": [pytest.approx(0.01)] * 2, "b": [pytest.approx(0.06)] * 2}


def test_seconds_are_of_one_call():
    machine = Machine()
    seconds = timing.interleave({"a": (machine.sample("a", 0.25), 8)}, rounds=2)
    assert seconds == {"a": [0.25, 0.25]}


def test_a_machine_that_slows_down_does_not_change_the_ratio():
    machine = Machine(slowing=0.01)
    samples = {"fast": (machine.sample("fast", 1.0), 1), "slow": (machine.sample("slow", 2.0), 1)}
    seconds = timing.interleave(samples, rounds=20)
    fast, slow = (timing.statistics_of(seconds[name]).median for name in ("fast", "slow"))
    assert slow / fast == pytest.approx(2.0, rel=0.02)
    one_after_the_other = Machine(slowing=0.01)
    apart = [
        timing.statistics_of(timing.interleave({n: (one_after_the_other.sample(n, s), 1)}, 20)[n]).median
        for n, s in (("fast", 1.0), ("slow", 2.0))
    ]
    assert apart[1] / apart[0] > 2.2


def test_statistics():
    assert timing.statistics_of([3.0]) == (3.0, 3.0, 3.0)
    assert timing.statistics_of([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0)
    outlier = timing.statistics_of([1.0, 1.0, 1.0, 1.0, 100.0])
    assert outlier == (1.0, 1.0, 1.0)


def test_number_of_rounds():
    assert timing.rounds_for(1e-6) == timing.rounds_for(0.01) == 25
    assert timing.rounds_for(2.0) == 10
    assert timing.rounds_for(1000.0) == 5
