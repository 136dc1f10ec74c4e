"""By how much each part of some costs has changed: what scales explain new costs best.

A cost is a sum of parts. Given what each part of some samples was and what they cost now, the
scales of the parts are the least squares of what is left of the samples' logarithms, and of the
scales' own: what no sample shows keeps its scale. By Gauss and Newton, with half a step wherever a
whole one goes too far (as it does where parts of very different size are off by a factor of ten).
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# What the logarithm of a scale weighs against that of a sample; steps, and what is none.
_RIDGE, _STEPS, _LEAST_STEP = 0.1, 16, 1e-3


def scales_of(parts: Floats, costs: Floats, start: float) -> Floats:
    """Logarithms of the scales, (terms,), of `parts`, (samples, terms), at least 0 and some above
    it in each sample, that cost the logarithms `costs`, (samples,) now; all are sought from `start`
    on."""
    scales = np.full(parts.shape[1], start)
    for _ in range(_STEPS):
        step = _newton(parts, costs, scales)
        worst = _left(parts, costs, scales)
        while _left(parts, costs, scales + step) > worst:
            step = step / 2.0
            if np.abs(step).max() < _LEAST_STEP:
                return scales
        scales = scales + step
    return scales


def _newton(parts: Floats, costs: Floats, scales: Floats) -> Floats:
    scaled = parts * np.exp(scales)
    cost = scaled.sum(axis=1)
    slopes = np.vstack([scaled / cost[:, None], _RIDGE * np.eye(len(scales))])
    step: Floats = np.linalg.lstsq(slopes, _residuals(parts, costs, scales), rcond=None)[0]
    return step


def _residuals(parts: Floats, costs: Floats, scales: Floats) -> Floats:
    return np.append(costs - np.log(parts @ np.exp(scales)), -_RIDGE * scales)


def _left(parts: Floats, costs: Floats, scales: Floats) -> float:
    return float(np.square(_residuals(parts, costs, scales)).sum())
