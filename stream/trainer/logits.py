"""Log odds of scores."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["logits"]

# A float32 can't represent a score nearer to 1 than this. The metrics have the same limit.
_CLIP = 1e-7


def logits(scores: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """The log odds of scores (N,), between -16.1 and 16.1; NaN for NaN."""
    clipped = np.clip(np.asarray(scores, np.float64), _CLIP, 1 - _CLIP)
    return np.log(clipped) - np.log1p(-clipped)
