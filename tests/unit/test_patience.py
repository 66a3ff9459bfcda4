"""Admission of a session's first round, as a pure function of what routing predicted."""

from __future__ import annotations

import pytest

from shared.core.patience import measure_excess_wait_s
from shared.core.routing import OptionEstimate
from shared.messages import Slo

SLO = Slo(ttft_s=2.0, itl_s=0.1)


def option(queue_s: float, prefill_s: float, transfer_s: float = 0.0) -> OptionEstimate:
    return OptionEstimate(
        placement="local",
        worker_id="w",
        num_new_tokens=100,
        num_moved_tokens=0,
        windowed_s=0.0,
        queue_s=queue_s,
        transfer_s=transfer_s,
        prefill_s=prefill_s,
        work_s=prefill_s,
    )


@pytest.mark.parametrize(
    ("options", "waited_s", "excess_s"),
    [
        ([option(7.0, 1.0)], 0.0, 0.0),  # 8 s are just 4 objectives
        ([option(7.5, 1.0)], 0.0, 6.5),
        ([option(7.0, 1.0)], 1.0, 7.0),  # 9 s with what has passed: more than the queue would not help
        ([option(7.5, 1.0), option(3.0, 1.0)], 0.0, 0.0),  # the best option counts
        ([option(1.0, 9.0)], 0.0, 0.0),  # late on an idle cluster too
        ([option(1.0, 5.0, 4.0)], 0.0, 0.0),
        ([option(5.0, 4.0)], 0.0, 5.0),
    ],
)
def test_only_a_wait_far_past_the_objective_is_a_reason_to_refuse(
    options: list[OptionEstimate], waited_s: float, excess_s: float
) -> None:
    assert measure_excess_wait_s(options, SLO, waited_s, factor=4.0) == pytest.approx(excess_s)
