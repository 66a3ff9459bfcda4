"""How well a profile predicts the steps that it was measured from, and those held out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from planner.fit_profile import StepSample
from shared.core.profile import Profile
from shared.core.step_costs import StepCosts
from shared.errors import AmpdError, ErrorCode

TARGET_MEDIAN_ERROR, TARGET_P90_ERROR = 0.10, 0.20  # |predicted / measured - 1| on held-out steps


def describe_points(samples: Iterable[StepSample]) -> list[dict[str, Any]]:
    """The samples as `provenance["points"]` keeps them."""
    return [
        {
            "kind": sample.shape.kind,
            "held_out": sample.held_out,
            "batch": sample.shape.batch,
            "mean_context": round(sample.shape.mean_context, 1),
            "chunks": [list(chunk) for chunk in sample.shape.chunks],
            "measured_s": float(f"{sample.seconds:.5g}"),
        }
        for sample in samples
    ]


def summarise_fit(profile: Profile) -> dict[str, Any]:
    """Predicted against measured for every point in the profile's provenance, computed anew from its tables.

    {name, rows: [{kind, held_out, batch, mean_context, chunks, measured_s, predicted_s, error}], fitted, held_out,
    held_out_by_kind, target_median, target_p90, target_met}; an error is predicted / measured - 1, a summary
    {num_points, median, p90, max} is of absolute errors. Raises AmpdError INVALID_REQUEST for a profile without
    measured points.
    """
    points = profile.provenance.get("points")
    if not points:
        raise AmpdError(
            ErrorCode.INVALID_REQUEST,
            f"profile {profile.name} has no measured points in its provenance: only what `ampd profile` wrote can "
            "be compared with measurements",
        )
    costs = StepCosts.from_profile(profile, profile.degrees[0].parallel_degree)
    rows = [_compare(costs, point) for point in points]
    held_out = [row for row in rows if row["held_out"]]
    summary = summarise_errors(held_out)
    return {
        "name": profile.name,
        "rows": rows,
        "fitted": summarise_errors([row for row in rows if not row["held_out"]]),
        "held_out": summary,
        "held_out_by_kind": {
            kind: summarise_errors([row for row in held_out if row["kind"] == kind])
            for kind in sorted({row["kind"] for row in held_out})
        },
        "target_median": TARGET_MEDIAN_ERROR,
        "target_p90": TARGET_P90_ERROR,
        "target_met": bool(held_out)
        and summary["median"] <= TARGET_MEDIAN_ERROR
        and summary["p90"] <= TARGET_P90_ERROR,
    }


def summarise_errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Absolute errors of `rows`; {"num_points": 0} where there are none."""
    if not rows:
        return {"num_points": 0}
    errors = sorted(abs(row["error"]) for row in rows)
    return {
        "num_points": len(errors),
        "median": round(statistics.median(errors), 4),
        "p90": round(errors[-(-9 * len(errors) // 10) - 1], 4),  # nearest rank
        "max": round(errors[-1], 4),
    }


def _compare(costs: StepCosts, point: Mapping[str, Any]) -> dict[str, Any]:
    chunks = [(history, chunk) for history, chunk in point["chunks"]]
    predicted_s = costs.step_s(point["batch"], point["mean_context"], chunks)
    return {**point, "predicted_s": predicted_s, "error": predicted_s / point["measured_s"] - 1.0}
