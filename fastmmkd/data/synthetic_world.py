"""The fixed part of the generator in `fastmmkd.data.synthetic`: constants of each data set kind, directions, sensors.

Symbols are those of the equations there. Shape legend: C label values, K evidences per modality (1 for sentiment,
4 for emotions), F frames, d features of a modality.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np
from scipy.stats import gamma

from fastmmkd.data.store import EMOTIONS, SPLITS
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES

WORLD_SEED = 20240224
"""Directions, sensors and topics are drawn from this and the kind alone: every `seed` and `fraction` shares them."""

TOPICS = 12
TOPIC_LEAN = 0.7
"""gamma: in the training split a topic is exp(2 gamma) times as likely in clips of the sign that it leans to."""
SPEAKER_LEAN = 0.6
"""beta: the same for speakers, in every split."""


@dataclass(frozen=True)
class Channel:
    """How one modality shows its evidence; amplitudes are in units of the evidence noise (which has variance 1)."""

    width: int
    """d, features per frame."""
    cue_rate: float
    """pi, probability that a frame shows the evidence."""
    cue_noise: float
    """sigma, noise along a cue direction."""
    rest_noise: float
    """rho, noise along every direction orthogonal to the cue directions."""
    speaker_rank: int
    speaker_scale: float
    topic_scale: float = 0.0
    topic_rate: float = 0.0
    """Probability that a frame shows the clip's topic."""
    missing_rate: float = 0.0
    """Probability that a frame is lost: all features zero."""
    tail: float = 0.0
    """a: heaviness of the sensor's tails; 0 is a linear sensor."""


CHANNELS: Mapping[str, Channel] = MappingProxyType(
    {
        "language": Channel(300, 0.40, 0.40, 0.25, 8, 0.30, topic_scale=0.8, topic_rate=0.3),
        "audio": Channel(74, 0.35, 0.40, 0.25, 4, 0.30, missing_rate=0.02, tail=0.7),
        "visual": Channel(35, 0.35, 0.40, 0.25, 4, 0.25, missing_rate=0.05),
    }
)


@dataclass(frozen=True)
class Kind:
    """Shape, label distribution and evidence of one imitated data set."""

    name: str
    sizes: tuple[int, int, int]
    """Samples in train, valid, test at fraction 1."""
    steps: int
    """T, the longest clip in frames (words)."""
    median_length: float
    length_spread: float
    """Standard deviation of the logarithm of the length."""
    clips_per_speaker: int
    label_kind: str
    support: tuple[float, ...]
    """Label values (score) or class indices in the order of `EMOTIONS`."""
    prior: tuple[float, ...]
    """p(y), the same in all splits."""
    strength: tuple[float, float, float]
    """kappa per modality."""
    correlation: tuple[float, float, float]
    """C_la, C_lv, C_av."""
    emotion_strength: tuple[float, ...] = (1.0,)
    """Factor on kappa, one per evidence."""

    @property
    def evidences(self) -> int:
        """K."""
        return len(self.emotion_strength)

    def means(self) -> np.ndarray:
        """Mean of the evidence, `[C, K, 3]`: kappa_m h_k g_k(y)."""
        return self.signal()[:, :, None] * np.array(self.strength)

    def signal(self) -> np.ndarray:
        """`[C, K]`: tanh(y / 1.5) for scores; h_k for the emotion that holds and -h_k for the others."""
        if self.label_kind == "score":
            return np.tanh(np.array(self.support) / 1.5)[:, None]
        return (2 * np.eye(len(EMOTIONS)) - 1) * np.array(self.emotion_strength)

    def covariance(self) -> np.ndarray:
        """C, `[3, 3]` with unit diagonal, between the modalities' evidence noises."""
        la, lv, av = self.correlation
        return np.array([[1, la, lv], [la, 1, av], [lv, av, 1]])

    def affinity(self, groups: int) -> np.ndarray:
        """`[groups, C]`, in [-1, 1]: +1 where a speaker or topic leans to the label value, -1 where away from it."""
        if self.label_kind == "score":
            return np.outer(np.where(np.arange(groups) % 2, 1, -1), np.sign(self.support))
        return np.where(np.arange(groups)[:, None] % len(EMOTIONS) == np.arange(len(EMOTIONS)), 1.0, -1.0)


def score_labels(
    annotators: int, negative: float, zero: float, shape: float, scale: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Support and prior of an average of integer ratings in [-3, 3].

    Multiples of 1 / annotators; `zero` is p(y = 0), `negative` is p(y < 0 | y != 0), and |y| is a gamma density
    (shape, scale) at the support points, the same on both sides.
    """
    values = np.arange(1, 3 * annotators + 1) / annotators
    side = gamma.pdf(values, shape, scale=scale)
    side *= (1 - zero) / side.sum()
    support = np.concatenate([-values[::-1], [0.0], values])
    prior = np.concatenate([negative * side[::-1], [zero], (1 - negative) * side])
    return tuple(support.tolist()), tuple(prior.tolist())


MOSI_LABELS = score_labels(annotators=5, negative=0.53, zero=0.04, shape=3.0, scale=0.6)
MOSEI_LABELS = score_labels(annotators=3, negative=0.38, zero=0.22, shape=1.2, scale=0.8)

# `strength` and `correlation` of the two sentiment kinds bring the ideal classifier's expected F1 to within 1 point of
# the targets named in `fastmmkd.data.synthetic`; a test checks them by Monte Carlo. Two values of C_la do: a small one,
# where audio always votes the way it sounds, and this large one (see "Redundancy" there).
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "mosi": Kind(
            name="mosi",
            sizes=(1284, 229, 686),
            steps=50,
            median_length=11.0,
            length_spread=0.55,
            clips_per_speaker=15,
            label_kind="score",
            support=MOSI_LABELS[0],
            prior=MOSI_LABELS[1],
            strength=(1.55, 0.79, 0.58),
            correlation=(0.77, 0.0, -0.14),
        ),
        "mosei": Kind(
            name="mosei",
            sizes=(16326, 1871, 4659),
            steps=50,
            median_length=18.0,
            length_spread=0.5,
            clips_per_speaker=15,
            label_kind="score",
            support=MOSEI_LABELS[0],
            prior=MOSEI_LABELS[1],
            strength=(2.1, 1.0, 0.71),
            correlation=(0.79, -0.08, -0.18),
        ),
        "iemocap": Kind(
            name="iemocap",
            sizes=(2717, 798, 938),
            steps=20,
            median_length=12.0,
            length_spread=0.5,
            clips_per_speaker=15,
            label_kind="emotions",
            support=(0.0, 1.0, 2.0, 3.0),
            prior=(135 / 938, 193 / 938, 227 / 938, 383 / 938),
            strength=(0.95, 0.55, 0.4),
            correlation=(0.77, 0.0, -0.14),
            emotion_strength=(1.0, 1.0, 1.0, 0.7),
        ),
    }
)


def kind_named(like: str) -> Kind:
    """Raises UserError: `like` is not one of the kinds."""
    if like not in KINDS:
        raise UserError(f"like = {like!r}: expected one of {', '.join(KINDS)}")
    return KINDS[like]


@dataclass(frozen=True)
class Sensor:
    """An elementwise invertible map from latent frames to stored features: x = offset + scale * s(latent / unit).

    s(v) = sinh(a v) / a with a = `tail`, or v itself when a = 0.
    """

    offset: np.ndarray
    """`[d]` float64."""
    scale: np.ndarray
    """`[d]` float64, positive."""
    unit: float
    """Standard deviation of a latent feature."""
    tail: float

    def measure(self, latent_fd: np.ndarray) -> np.ndarray:
        """Latent frames `[F, d]` -> features `[F, d]` float32."""
        v = latent_fd / self.unit
        bent = np.sinh(self.tail * v) / self.tail if self.tail else v
        return (self.offset + self.scale * bent).astype(np.float32)

    def invert(self, features_fd: np.ndarray) -> np.ndarray:
        """Features `[F, d]` -> latent frames `[F, d]` float64."""
        bent = (features_fd.astype(np.float64) - self.offset) / self.scale
        v = np.arcsinh(self.tail * bent) / self.tail if self.tail else bent
        return v * self.unit


@dataclass(frozen=True)
class Directions:
    """Orthonormal rows; the three groups are orthogonal to each other."""

    cues: np.ndarray
    """U, `[K, d]`."""
    speaker: np.ndarray
    """`[speaker_rank, d]`."""
    topics: np.ndarray
    """`[TOPICS, d]`, or `[0, d]` where the modality has no topics."""


@dataclass(frozen=True)
class World:
    """What all samples of a kind share."""

    kind: Kind
    directions: Mapping[str, Directions]
    sensors: Mapping[str, Sensor]

    def evidence_traces(self, modality: str, features_fd: np.ndarray) -> np.ndarray:
        """z: features `[F, d]` of present frames -> their component along the cue directions, `[F, K]` float64."""
        return self.sensors[modality].invert(features_fd) @ self.directions[modality].cues.T


@lru_cache(maxsize=len(KINDS))
def world_of(like: str) -> World:
    """The world of a kind; the same in every process.

    Raises:
        UserError: `like` is not one of the kinds.
    """
    kind = kind_named(like)
    seeds = np.random.SeedSequence([WORLD_SEED, list(KINDS).index(like)]).spawn(len(MODALITIES))
    directions, sensors = {}, {}
    for modality, seed in zip(MODALITIES, seeds, strict=True):
        rng = np.random.default_rng(seed)
        directions[modality] = _directions(CHANNELS[modality], kind.evidences, rng)
        sensors[modality] = _sensor(modality, kind, rng)
    return World(kind, MappingProxyType(directions), MappingProxyType(sensors))


def _directions(channel: Channel, evidences: int, rng: np.random.Generator) -> Directions:
    topics = TOPICS if channel.topic_scale else 0
    counts = (evidences, channel.speaker_rank, topics)
    q, r = np.linalg.qr(rng.standard_normal((channel.width, sum(counts))))
    # QR is unique only up to signs, which may differ between LAPACK builds.
    rows = (q * np.sign(np.diag(r))).T
    return Directions(*np.split(rows, np.cumsum(counts)[:-1]))


def _sensor(modality: str, kind: Kind, rng: np.random.Generator) -> Sensor:
    channel = CHANNELS[modality]
    d = channel.width
    if modality == "language":  # word vectors: centred, all features alike
        offset, scale = np.zeros(d), np.full(d, 0.4)
    elif modality == "audio":  # COVAREP: units differ by orders of magnitude; feature 0 is the pitch in Hz
        scale = rng.lognormal(-1.0, 1.5, d)
        offset = scale * rng.standard_normal(d)
        offset[0], scale[0] = 166.0, 60.0
    else:  # Facet: intensities around a positive level
        scale = rng.lognormal(-1.0, 0.7, d)
        offset = scale * rng.uniform(0.0, 2.0, d)
    return Sensor(offset, scale, _latent_std(channel, kind.evidences), channel.tail)


def _latent_std(channel: Channel, evidences: int) -> float:
    """Root of a latent feature's mean variance, with evidence of second moment 2."""
    along_cues = evidences * (2 * channel.cue_rate + channel.cue_noise**2)
    nuisance = channel.speaker_rank * channel.speaker_scale**2 + channel.topic_rate * channel.topic_scale**2
    return float(np.sqrt(channel.rest_noise**2 + (along_cues + nuisance) / channel.width))


def split_sizes(kind: Kind, fraction: float, minimum: int = 16) -> dict[str, int]:
    """Samples per split: `round(size * fraction)`, at least `minimum`.

    Raises:
        UserError: `fraction` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"fraction = {fraction}: expected a number above 0 and at most 1")
    return {split: max(minimum, round(size * fraction)) for split, size in zip(SPLITS, kind.sizes, strict=True)}
