"""Public differentiable operations. Models call these and never know which implementation runs."""

from fastmmkd.ops.cross_attention import cross_attention
from fastmmkd.ops.gaussian_mmd import gaussian_mmd
from fastmmkd.ops.js_divergence import js_divergence
from fastmmkd.ops.missing_draw import missing_draw
from fastmmkd.ops.registry import OPERATIONS, PROVIDERS, explain, use_provider
from fastmmkd.ops.residual_layer_norm import residual_layer_norm

__all__ = [
    "OPERATIONS",
    "PROVIDERS",
    "cross_attention",
    "explain",
    "gaussian_mmd",
    "js_divergence",
    "missing_draw",
    "residual_layer_norm",
    "use_provider",
]
