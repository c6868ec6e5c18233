"""How close is equal: the measures of the oracle, in one place.

Against PEFT in the dtype of the base: in float32 an error of 2e-6 of the tensor's largest weight; in bfloat16 at most
one element in a thousand differs, by one ulp; where weight and delta cancel, an ulp of what is left is less than the
error of PEFT's float32 arithmetic, which then counts. Against the float64 result: the rounding nearest to it.
"""

from __future__ import annotations

import torch

from tests.oracle.case import Tensors

FLOAT32_ERROR = 2e-6
DIFFERING = 1e-3
NOISE = 1e-12
"""What the order of additions in float64 may move a value by, as a share of the largest."""
LOGIT_ERROR = 2e-5


def assert_same_names(ours: Tensors, theirs: Tensors, allowed: frozenset[str] = frozenset()) -> None:
    """Both sides have the same tensors, but for `allowed` ones that only we have."""
    assert not ours.keys() - theirs.keys() - allowed, f"only ours: {sorted(ours.keys() - theirs.keys() - allowed)}"
    assert not theirs.keys() - ours.keys(), f"only theirs: {sorted(theirs.keys() - ours.keys())}"


def assert_parity(ours: Tensors, theirs: Tensors, skip: tuple[str, ...], error: float = FLOAT32_ERROR) -> None:
    """PEFT's merged tensors, within what its own rounding leaves open. `skip`: endings of names to leave out."""
    differing = total = 0
    for name, expected in theirs.items():
        got = ours[name]
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
        if name.endswith(skip or ("\0",)):
            continue
        if got.dtype == torch.float32:
            off = (got - expected).abs().max()
            assert off <= error * expected.abs().max(), f"{name}: off by {off:.3g}"
            continue
        apart = ulps_apart(got, expected)
        far = (apart > 1) & ((got.float() - expected.float()).abs() > error * expected.float().abs().max())
        assert not bool(far.any()), f"{name}: up to {int(apart[far].max())} ulp apart in {int(far.sum())} elements"
        differing, total = differing + int(apart.sum()), total + apart.numel()
    assert differing <= DIFFERING * total, f"{differing} of {total} elements differ from PEFT's"


def ulps_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Steps of bfloat16 between two tensors, element by element."""
    return (_ordinal(a) - _ordinal(b)).abs()


def _ordinal(values: torch.Tensor) -> torch.Tensor:
    bits = values.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def assert_correctly_rounded(ours: Tensors, exact: Tensors) -> None:
    """No element could have been rounded to a value nearer to the float64 result."""
    for name, expected in exact.items():
        got, wide = ours[name], expected.double()
        best = (wide.to(torch.float32).to(got.dtype).double() - wide).abs()
        worse = (got.double() - wide).abs() - best
        assert float(worse.max()) <= NOISE * float(wide.abs().max()), f"{name}: {int((worse > 0).sum())} not nearest"


def assert_same_bytes(ours: Tensors, base: Tensors, names: set[str]) -> None:
    """Tensors that the adapter does not change are the base's, bit by bit."""
    for name in names:
        assert ours[name].dtype == base[name].dtype, name
        assert torch.equal(ours[name].view(torch.uint8), base[name].view(torch.uint8)), name


def assert_same_outputs(ours: torch.Tensor, theirs: torch.Tensor, unadapted: torch.Tensor) -> None:
    """The merged model computes what the base with its active adapter does, which is not what the base does."""
    scale = float(theirs.abs().max())
    assert ours.shape == theirs.shape
    if unadapted.shape == theirs.shape:
        assert float((unadapted - theirs).abs().max()) > 100 * LOGIT_ERROR * scale, "the adapter has no effect to see"
    error = float((ours - theirs).abs().max())
    assert error <= LOGIT_ERROR * scale, f"outputs differ by {error:.3g} of {scale:.3g}"
