"""Cayley's transform: an orthogonal matrix out of a skew-symmetric one, exact or as the first terms of its series.

`(I - Q)(I + Q)^-1 = I - 2 Q + 2 Q^2 - ...`; PEFT's series has plus signs, which is the transform of `-Q`, and its
factors stand where they are. All functions work on a stack (N, B, B) in the arithmetic's dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def skew_of_triangles(triangles: Tensor, size: int) -> Tensor:
    """The skew-symmetric matrices (N, B, B) whose strict upper triangles, row by row, are `triangles`
    (N, B (B - 1) / 2)."""
    import torch

    rows, cols = torch.triu_indices(size, size, 1, device=triangles.device)
    square = triangles.new_zeros(len(triangles), size, size)
    square[:, rows, cols] = triangles
    return square - square.mT


def skew_part(squares: Tensor) -> Tensor:
    """The skew-symmetric part of any matrices (N, B, B)."""
    return (squares - squares.mT) / 2


def within(matrices: Tensor, radius: float) -> Tensor:
    """`matrices`, each shrunk to the Frobenius norm `radius` where it has a larger one."""
    norms = matrices.flatten(1).norm(dim=1)[:, None, None]
    shrunk: Tensor = matrices * (radius / norms.clamp(min=radius))
    return shrunk


def cayley(skew: Tensor) -> Tensor:
    """`(I - Q)(I + Q)^-1`."""
    import torch

    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    turn: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    return turn


def neumann(skew: Tensor, powers: int, last: float) -> Tensor:
    """`I + 2 Q + 2 Q^2 + ...` up to Q to the power of `powers`, which counts `last` times."""
    import torch

    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    total, power = identity.clone(), identity
    for number in range(1, powers + 1):
        power = power @ skew
        total += power * (last if number == powers else 2.0)
    return total
