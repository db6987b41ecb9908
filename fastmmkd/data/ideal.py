"""The ideal classifier of synthetic data: the exact posterior of the label under `fastmmkd.data.synthetic`.

Frames enter through the traces z = U latent only: everything else in a frame is independent of the label, given z. With
the evidence e_mk integrated over a grid, per evidence k and for the modalities S that a condition keeps,

    log L_mk(e) = sum over present frames f of  log[ 1 - pi_m + pi_m exp((z_fk e - e^2 / 2) / sigma_m^2) ]
    A_k(y)      = integral over e in R^|S| of  N(e; mean_k(y)_S, C_SS)  prod over m in S of L_mk(e_m)
    P(y | S)    = p(y) prod_k A_k(y) / sum over y' of the same

(L is the frames' density divided by the constant density without any cue). A lost frame carries no information, a
missing modality drops out of the Gaussian exactly, and sensors are bijections whose Jacobian does not depend on e.

Shape legend: N samples, F frames, C label values, K evidences, G grid points.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.sparse import csr_matrix
from scipy.stats import multivariate_normal

from fastmmkd.data.store import Split
from fastmmkd.data.synthetic_world import CHANNELS, Channel, Kind, World
from fastmmkd.modalities import CONDITIONS, MODALITIES, condition_modalities

GRID_STEP = 0.15
GRID_MARGIN = 4.2
"""The grid reaches this many standard deviations of the evidence beyond its largest mean."""
CHUNK = 64
"""Samples integrated at once: `CHUNK * C * G^2` float32 numbers are in memory."""


def ideal_posteriors(split: Split, world: World) -> dict[str, np.ndarray]:
    """Posterior of the label of every sample under the seven conditions, from the stored features.

    Args:
        split: as `fastmmkd.data.synthetic.synthesize` makes it; any frames may have been zeroed since.
        world: the one it was made in.

    Returns:
        Condition -> `[N, C]` float32 over `world.kind.support`; rows sum to 1.
    """
    traces = {}
    for modality in MODALITIES:
        mask = split.frame_mask(modality)
        frames = split.features[modality][mask]
        traces[modality] = world.evidence_traces(modality, frames), split.row_samples(modality)[mask]
    return posteriors_from_traces(world.kind, len(split), traces)


def posteriors_from_traces(
    kind: Kind, samples: int, traces: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    """As `ideal_posteriors`, from modality -> (z `[F, K]`, the sample `[F]` that each frame belongs to)."""
    grid = evidence_grid(kind)
    likelihoods = {
        modality: _likelihood(CHANNELS[modality], z, sample, samples, grid) for modality, (z, sample) in traces.items()
    }
    return {condition: _posterior(kind, likelihoods, condition, grid) for condition in CONDITIONS}


def evidence_grid(kind: Kind) -> np.ndarray:
    """`[G]`, equally spaced and symmetric around 0."""
    half = int(np.ceil((np.abs(kind.means()).max() + GRID_MARGIN) / GRID_STEP))
    return np.arange(-half, half + 1) * GRID_STEP


def _likelihood(channel: Channel, z_fk: np.ndarray, sample: np.ndarray, samples: int, grid: np.ndarray) -> np.ndarray:
    """L_mk(e) on the grid, `[N, K, G]` float32, scaled to a maximum of 1; 1 everywhere for a sample without frames."""
    frames, evidences = z_fk.shape
    exponent = (z_fk[:, :, None] * grid - grid**2 / 2) / channel.cue_noise**2
    log_l = np.logaddexp(np.log1p(-channel.cue_rate), np.log(channel.cue_rate) + exponent)
    membership = csr_matrix((np.ones(frames), (sample, np.arange(frames))), shape=(samples, frames))
    total = (membership @ log_l.reshape(frames, evidences * len(grid))).reshape(samples, evidences, len(grid))
    return np.exp(total - total.max(axis=-1, keepdims=True)).astype(np.float32)


def _posterior(kind: Kind, likelihoods: Mapping[str, np.ndarray], condition: str, grid: np.ndarray) -> np.ndarray:
    """`[N, C]` float32."""
    kept = np.flatnonzero(condition_modalities(condition))
    factors = [likelihoods[MODALITIES[m]] for m in kept]
    covariance = kind.covariance()[np.ix_(kept, kept)]
    log_p = np.log(np.array(kind.prior))[None, :]
    for k, means in enumerate(np.moveaxis(kind.means()[:, :, kept], 1, 0)):
        # Emotions share two means among four labels: integrate over distinct ones only.
        distinct, of_label = np.unique(means, axis=0, return_inverse=True)
        density = _gaussian_on_grid(grid, distinct, covariance)
        evidence = _integrate(density, [factor[:, k] for factor in factors])
        # A label further off than float32 reaches has no probability worth telling from 0.
        log_a = np.log(np.maximum(evidence, np.finfo(np.float32).tiny))
        log_p = log_p + log_a[:, of_label.reshape(-1)]
    p = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    return (p / p.sum(axis=1, keepdims=True)).astype(np.float32)


def _gaussian_on_grid(grid: np.ndarray, means: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """N(e; mean, C) on the grid's S-fold product: means `[C, S]` -> `[G, ..., G, C]` float32."""
    axes = means.shape[1]
    points = np.stack(np.meshgrid(*[grid] * axes, indexing="ij"), axis=-1)
    return np.stack([multivariate_normal(mean, covariance).pdf(points) for mean in means], axis=-1).astype(np.float32)


def _integrate(density: np.ndarray, factors: list[np.ndarray]) -> np.ndarray:
    """Sum `density[g1, .., gS, c] * prod_m factors[m][n, g_m]` over the grid -> `[N, C]` float32."""
    first, *others = factors
    grid, samples = first.shape[1], len(first)
    result = np.empty((samples, density.shape[-1]), dtype=np.float32)
    for start in range(0, samples, CHUNK):
        rows = slice(start, start + CHUNK)
        part = first[rows] @ density.reshape(grid, -1)
        for factor in others:
            part = (factor[rows, None, :] @ part.reshape(len(part), grid, -1))[:, 0]
        result[rows] = part
    return result
