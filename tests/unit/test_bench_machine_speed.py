"""A profile slowed down to what a live run's steps took."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks.scheduling.machine_speed import BATCH_TOKENS, measure_speed, slow_down
from shared.core.profile import decode_profile
from shared.core.step_costs import StepCosts
from shared.messages import StepTimes
from shared.profile_files import load_profile

PROFILE = load_profile("h100-qwen3-32b")


def test_the_speed_is_of_all_workers_steps_together() -> None:
    prefill = StepTimes(prefill_s=6.0, prefill_profile_s=5.0)
    both = StepTimes(prefill_s=6.0, prefill_profile_s=3.0, decode_s=3.0, decode_profile_s=2.0)
    assert measure_speed([prefill, both]) == (12.0 / 8.0, 1.5)
    assert measure_speed([prefill]) == (1.2, 1.0), "no step has decoded"


@pytest.mark.parametrize(("prefill", "decode"), [(1.0, 1.0), (1.1, 1.4), (0.7, 1.3), (1.3, 0.7)])
def test_steps_take_so_many_times_longer(prefill: float, decode: float) -> None:
    slow = decode_profile(msgspec.json.encode(slow_down(PROFILE, prefill, decode)), "slow")  # a valid one
    assert [one.parallel_degree for one in slow.degrees] == [one.parallel_degree for one in PROFILE.degrees]
    for degree in (1, 4):
        before, after = StepCosts.from_profile(PROFILE, degree), StepCosts.from_profile(slow, degree)
        for batch in (1, 8, BATCH_TOKENS):
            assert after.decode_step_s(batch, 900.0) == pytest.approx(decode * before.decode_step_s(batch, 900.0))
        for num_history, num_new in ((0, 4_096), (8_192, 2_048)):
            wanted_s = prefill * before.prefill_s(num_history, num_new)
            assert after.prefill_s(num_history, num_new) == pytest.approx(wanted_s)
