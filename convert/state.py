"""A BatchNorm's parameters and running statistics, as NumPy arrays."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class BatchNormState:
    """A BatchNorm's parameters and running statistics, shape (C,); mean and var are None where it keeps none."""

    gamma: Array
    beta: Array
    mean: Array | None
    var: Array | None
    eps: float

    def running(self) -> tuple[Array, Array]:
        """Return the running mean and deviation, ε included; raises `ValueError` where there are none."""
        if self.mean is None or self.var is None:
            raise ValueError("expected a BatchNorm with running statistics, received one without")
        return self.mean, np.sqrt(self.var + self.eps)

    def problems(self) -> list[str]:
        """Return what makes this state unusable: non-finite values, negative variances, no channels."""
        found = []
        if self.gamma.size == 0:
            found.append("no channels")
        for label, array in (
            ("gamma", self.gamma),
            ("beta", self.beta),
            ("mean", self.mean),
            ("var", self.var),
        ):
            bad = 0 if array is None else int(np.count_nonzero(~np.isfinite(array)))
            if bad:
                found.append(f"{bad} non-finite values in {label}")
        if self.var is not None and (negative := int(np.count_nonzero(self.var < 0))):
            found.append(f"{negative} negative running variances")
        if not self.eps >= 0:
            found.append(f"eps={self.eps} is negative")
        if self.eps == 0 and self.var is not None and (constant := int(np.count_nonzero(self.var == 0))):
            found.append(f"{constant} running variances of 0 with eps={self.eps}")
        return found
