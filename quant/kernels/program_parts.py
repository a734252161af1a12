"""What Triton programs of several operations call."""

import triton
import triton.language as tl


@triton.jit
def started(EARLY: tl.constexpr):
    """Before anything is read or written. EARLY: the kernel before may still run, and the next, which waits likewise, may be started."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def rounded_half_to_even(x):
    # 1.5 * 2^23: a sum this large has no bits for a fraction. Beyond 2^22 every code is clamped anyway.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def grid_of(low, high, wrong, top, half, SYMMETRIC: tl.constexpr):
    """Least and greatest of rows, and how many of their values are no numbers ▸ scale, zero."""
    if SYMMETRIC:
        most = tl.maximum(-low, high)
        s = tl.where(most == 0.0, 1.0, tl.div_rn(tl.maximum(most, 1e-5), half - 1.0))
        z = half + tl.zeros_like(s)
    else:
        equal = low == high
        low = tl.where(equal, tl.minimum(low, 0.0), low)
        high = tl.where(equal, tl.maximum(high, 0.0), high)
        width = tl.minimum(tl.maximum(tl.div_rn(high - low, top), 1e-5), 1e4)
        s = tl.where((low == 0.0) & (high == 0.0), 1.0, width)
        z = rounded_half_to_even(tl.minimum(tl.maximum(tl.div_rn(-low, s), -1e4), 1e4))
    return tl.where(wrong > 0, float("nan"), s), z


@triton.jit
def code_of(quotient, z, top):
    code = rounded_half_to_even(quotient) + z
    # Not minimum and maximum: what is not a number stays so.
    code = tl.where(code < 0.0, 0.0, code)
    return tl.where(code > top, top, code)


@triton.jit
def quotient(v, s, inverse, FMA: tl.constexpr):
    """v / s, rounded correctly, by the correctly rounded 1 / s: a division's own subroutine takes registers that a row needs. The first
    step leaves less than a unit, after which the second is exact (Markstein 1990). Where one of the numbers has no inverse or is
    subnormal the quotient may be another: such values round to 0, or mean nothing."""
    if FMA:
        q = v * inverse
        q = tl.fma(tl.fma(-q, s, v), inverse, q)
        return tl.fma(tl.fma(-q, s, v), inverse, q)
    else:
        return tl.div_rn(v, s)
