"""From right guesses to a lower bound on epsilon."""

import numpy as np
from scipy.special import expit
from scipy.stats import binom


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How likely so many guesses or more are right under (epsilon, delta)-DP, at most.

    Each of the canaries was included by a fair coin of its own; on the others than `guesses` the attacker
    abstains. Source: Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run",
    Theorem 5.2, as its Appendix D computes it.
    """
    correct = expit(epsilon)  # of randomized response, the most that pure DP allows
    tail = float(binom.sf(right - 1, guesses, correct))
    if not delta or not right:
        return min(1.0, tail)
    fewer = np.arange(1, right + 1)
    missed = np.cumsum(binom.pmf(right - fewer, guesses, correct)) / fewer
    return min(1.0, tail + 2 * canaries * delta * float(missed.max()))


def lower_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float = 0.95) -> float:
    """An epsilon that the mechanism does not keep at `delta`, with that confidence; 0 where nothing shows.

    The end of a bisection, to 1e-4 and from below. What is rejected at an epsilon is rejected at every
    smaller one, so the result is a bound wherever the bisection ends.
    """
    level = 1 - confidence
    if p_value(canaries, guesses, right, 0.0, delta) >= level:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(canaries, guesses, right, high, delta) < level:
        low, high = high, 2 * high
    while high - low > 1e-4:
        middle = (low + high) / 2
        if p_value(canaries, guesses, right, middle, delta) < level:
            low = middle
        else:
            high = middle
    return low
