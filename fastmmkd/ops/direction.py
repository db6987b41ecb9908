"""Unit vectors that are safe at 0 and at any scale."""

import torch


def direction(x: torch.Tensor) -> torch.Tensor:
    """`x / |x|` over the last axis; 0 with gradient 0 where x is 0.

    Dividing by the largest element first, a constant because the direction does not depend on it, keeps squares and
    their gradients in range.
    """
    largest = x.detach().abs().amax(-1, keepdim=True)
    zero = largest < torch.finfo(x.dtype).tiny
    scaled = x / largest.masked_fill(zero, 1.0)
    norm = scaled.square().sum(-1, keepdim=True).masked_fill(zero, 1.0).sqrt()
    return (scaled / norm).masked_fill(zero, 0.0)
