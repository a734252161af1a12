"""One program a row; the logits are read once, the largest and the sum of exponentials are kept beside each other."""

import triton
import triton.language as tl


@triton.jit
def pick(logits, tokens, out, vocabulary, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    # Finite, so that a block of -inf alone leaves the sum at 0 and not at NaN.
    largest = -3.0e38
    total = 0.0
    for first in range(0, vocabulary, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new), 0)
        largest = new
    token = tl.load(tokens + row)
    own = tl.load(logits + row * stride + token, mask=(token >= 0) & (token < vocabulary), other=float("nan")).to(tl.float32)
    tl.store(out + row, own - largest - tl.log(total))
