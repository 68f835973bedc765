"""The clip factors in the code of ACIQ's authors; only for reproducing their numbers.

Papers:
    Banner, Nahshan, Soudry, "Post training 4-bit quantization of convolutional networks for
        rapid-deployment", NeurIPS 2019, arXiv:1810.05723, and its code,
        github.com/submission2019/cnn-quantization.
"""

from __future__ import annotations

from fxq.errors import SpecError
from fxq.numerics.aciq import Prior

# What the authors' code ships: the roots for 2**bits steps, truncated (not rounded) to 2 decimals.
_TABLES = {
    (Prior.LAPLACE, False): (1.05, 1.86, 2.83, 3.89, 5.03, 6.2, 7.41, 8.64, 9.89),
    (Prior.LAPLACE, True): (1.86, 2.83, 3.89, 5.02, 6.2, 7.41, 8.64, 9.89, 11.16),
    (Prior.GAUSS, False): (None, 1.24, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92),
    (Prior.GAUSS, True): (None, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92, 4.2),
}


def paper_table_clip(prior: Prior, bits: int, fused_relu: bool = False) -> float:
    """The factor of the prior's scale in the authors' code; only for reproducing their numbers.

    Raises:
        SpecError: The tables have no such bit width.

    Example:
        >>> paper_table_clip(Prior.LAPLACE, 3), paper_table_clip(Prior.LAPLACE, 3, True)
        (3.89, 5.02)
    """
    table = _TABLES.get((prior, fused_relu), ())
    factor = table[bits] if 0 <= bits < len(table) else None
    if factor is None:
        raise SpecError(f"the authors have no {prior} clip for {bits} bits", hint="use prior_clip")
    return factor
