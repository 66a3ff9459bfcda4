"""From utilisation to waiting times: closed forms, good enough to compare plans and to say what to expect.

`missed_share`: customers with a deadline for the beginning of their service (M/M/1+D: D. Y. Barrer, "Queuing with
impatient customers and ordered service", Operations Research 5, 1957): holds below and above full utilisation. The
pool of c workers is taken as one that is c times as fast. Burstier work divides the exponent as in Kingman's formula.
"""

from __future__ import annotations

from math import exp, log

NEAR_FULL = 1e-6  # utilisations this close to 1 take the formula's limit


def missed_share(utilisation: float, patience: float, variability: float) -> float:
    """Share of prefills that do not begin in time.

    patience: the time until they must begin, in mean service times of the pool (all workers together).
    variability: (squared coefficients of variation of the times between arrivals + of service) / 2; 1 for M/M.
    """
    if utilisation <= 0.0:
        return 0.0
    decay = patience / max(variability, 0.05)
    slack = 1.0 - utilisation
    if abs(slack) < NEAR_FULL:
        return 1.0 / (1.0 + decay + utilisation)  # the limit
    exponent = -slack * decay
    if exponent > 500.0:
        return 1.0 - 1.0 / utilisation
    late = exp(exponent)
    return min(1.0, slack * utilisation * late / (1.0 - utilisation * utilisation * late))


def wait_quantile_s(utilisation: float, service_s: float, variability: float, quantile: float) -> float:
    """Waiting time that a share `quantile` of the prefills stays below; service_s: of the pool. Infinite from full
    utilisation on."""
    if utilisation >= 1.0:
        return float("inf")
    tail = 1.0 - quantile
    if utilisation <= tail:
        return 0.0
    return log(utilisation / tail) * service_s * max(variability, 0.05) / (1.0 - utilisation)
