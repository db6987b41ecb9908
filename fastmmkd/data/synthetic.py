"""Synthetic data sets shaped like MOSI, MOSEI and IEMOCAP, from a generative model whose ideal classifier is known.

The model of a clip i, modality m in {language, audio, visual}, frame t. Constants are in `synthetic_world`.

    label        y ~ p(y)                      score: mean of 5 ratings (MOSEI: 3); emotions: one of four
    evidence     e_k = h_k kappa g_k(y) + n_k  in R^3, one number per modality; n_k ~ N(0, C)
                                               score: one e, h = 1, g(y) = tanh(y / 1.5)
                                               emotions: four, g_k = +1 if k holds, else -1
    frame        z_mtk = c_mtk e_mk + sigma_m N(0, 1)          c_mtk ~ Bernoulli(pi_m): is the frame a cue for k?
                 v_mt  = U_m' z_mt + speaker_m + b_mt topic_m + rho_m (I - U_m' U_m) N(0, I)
                 x_mt  = offset_m + scale_m s_m(v_mt)          s: identity; audio: sinh(a v) / a, heavy-tailed
                 x_mt  = 0 with probability q_m                a lost frame (audio and visual)

- *Reliability*: kappa and C set how much a modality tells (language > audio > visual).
- *Redundancy*: the noises of language and audio are strongly correlated (C_la), so audio adds little to language, and
  what it adds it adds as a reference to subtract: with language there, the best linear weight of audio is negative.
  A model that only ever saw complete samples learns that weight and is wrong on audio alone, as complete-modality
  methods are on the real sets (below 45 on {a} in the papers' tables).
- *Complementarity*: C_av < 0, so audio and visual correct each other.
- Evidence saturates in y, so weak sentiment is the hardest.
- *Difficulty is in the evidence*, not in finding it: a clip's cue frames show e far above their noise.
- *Nuisance*, orthogonal to the cue directions U: a speaker offset of low rank, constant in a clip, and a topic that
  shows in some language frames. A speaker has about 15 clips and leans to one sign (or emotion):
  P(speaker | y) is proportional to exp(beta lean(speaker, y)). No speaker is in two splits, and lean and offset are
  independent, so who memorises speakers is misled. Topics are the same in all splits; P(topic | y) is proportional to
  exp(gamma lean(topic, y)) in training and uniform in validation and test: a shortcut that does not hold.
- p(y) is exact and the same in all splits (real MOSI's shift between splits is left out); labels are a stratified
  sample of it, so that small fractions keep its proportions.
- Lengths are lognormal, equal in the three modalities (word-aligned), and say nothing about y.
- U, sensors and topics depend on the kind only: all seeds and fractions sample one world, and `seed` chooses clips and
  speakers.

Given one clip outside the training split, the z of its present frames are sufficient for y, so the posterior in
`fastmmkd.data.ideal` is exact (what could be learnt from *other* test clips of the same speaker is not used). The
constants are tuned so that its weighted F1 non0 for mosi and mosei is about

    {l} 83   {a} 69   {v} 64   {l,a} 84   {l,v} 84   {a,v} 75   {l,a,v} 86
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from sklearn.metrics import f1_score

from fastmmkd.data.ideal import ideal_posteriors, posteriors_from_traces
from fastmmkd.data.store import EMOTIONS, SPLITS, Dataset, Split
from fastmmkd.data.synthetic_world import (
    CHANNELS,
    SPEAKER_LEAN,
    TOPIC_LEAN,
    TOPICS,
    WORLD_SEED,
    Kind,
    World,
    kind_named,
    split_sizes,
    world_of,
)
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES

SHORTEST = 3
"""Frames in the shortest clip."""
CHUNK = 1024
"""Clips rendered at once."""


def synthesize(like: str, fraction: float, seed: int) -> Dataset:
    """Draw a data set from the generative model above.

    Args:
        like: `"mosi"`, `"mosei"` or `"iemocap"`: sizes, lengths, feature widths and label distribution.
        fraction: of the real set's samples in each split, in (0, 1]; at least 16 samples per split.
        seed: at least 0; equal arguments give equal data.

    Returns:
        A data set with float32 features, posteriors of the ideal classifier for validation and test (`Split.ideal`,
        over `ideal_support`), and in `report` the generator's constants and the ideal's F1 in percent on the test
        split (`fastmmkd.data.synthetic.ideal_f1`). `normalisation` and `content_hash` are left to `store.write`.

    Raises:
        UserError: unknown `like`, `fraction` outside (0, 1], negative `seed`.
    """
    kind = kind_named(like)
    sizes = split_sizes(kind, fraction)
    if seed < 0:
        raise UserError(f"seed = {seed}: expected 0 or more")
    world = world_of(like)
    splits: dict[str, Split] = {}
    speakers: dict[str, list[int]] = {}
    first_speaker = 0
    for split, seeds in zip(SPLITS, np.random.SeedSequence(seed).spawn(len(SPLITS)), strict=True):
        clip_seed, *render_seeds = seeds.spawn(1 + len(MODALITIES))
        rng = np.random.default_rng(clip_seed)
        clips = draw_clips(kind, sizes[split], rng, TOPIC_LEAN if split == "train" else 0.0, first_speaker)
        renderers = dict(zip(MODALITIES, map(np.random.default_rng, render_seeds), strict=True))
        splits[split] = _render_split(world, clips, split, renderers)
        speakers[split] = sorted(set(clips.speaker.tolist()))
        first_speaker += clips.speaker_count
    for split in ("valid", "test"):
        splits[split].ideal = ideal_posteriors(splits[split], world)
    test = splits["test"]
    measured = {c: ideal_f1(kind, label_indices(kind, test.labels), p) for c, p in test.ideal.items()}
    return Dataset(
        splits=splits,
        label_kind=kind.label_kind,
        source=f"synthetic, like {like}, fraction {fraction:g}, seed {seed}",
        importer="synthetic",
        report={
            "generator": _constants(kind),
            "like": like,
            "fraction": fraction,
            "seed": seed,
            "speakers": {split: len(names) for split, names in speakers.items()},
            "ideal_f1_test": measured,
        },
        ideal_support=np.array(kind.support, dtype=np.float32),
    )


@dataclass(frozen=True)
class Clips:
    """Everything about N clips but their frames."""

    label: np.ndarray
    """`[N]` index into `Kind.support`."""
    speaker: np.ndarray
    """`[N]`, numbered through all splits."""
    first_speaker: int
    speaker_count: int
    topic: np.ndarray
    """`[N]`."""
    length: np.ndarray
    """`[N]` frames."""
    evidence: np.ndarray
    """e, `[N, K, 3]`."""


def draw_clips(
    kind: Kind, samples: int, rng: np.random.Generator, topic_lean: float = 0.0, first_speaker: int = 0
) -> Clips:
    """Labels, speakers, topics, lengths and evidence of `samples` clips."""
    label = _stratified_labels(np.array(kind.prior), samples, rng)
    speaker_count = max(2, round(samples / kind.clips_per_speaker))
    length = draw_lengths(kind, samples, rng)
    noise = rng.standard_normal((samples, kind.evidences, len(MODALITIES)))
    return Clips(
        label=label,
        speaker=first_speaker + _draw_groups(kind, label, speaker_count, SPEAKER_LEAN, rng),
        first_speaker=first_speaker,
        speaker_count=speaker_count,
        topic=_draw_groups(kind, label, TOPICS, topic_lean, rng),
        length=length,
        evidence=kind.means()[label] + noise @ np.linalg.cholesky(kind.covariance()).T,
    )


def draw_traces(
    clips: Clips, modality: str, rows: slice, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z `[F, K]`, the clip `[F]` of each frame, and whether the frame is present `[F]`, for the clips in `rows`."""
    channel = CHANNELS[modality]
    clip = np.repeat(np.arange(len(clips.label))[rows], clips.length[rows])
    evidence = clips.evidence[clip, :, MODALITIES.index(modality)]
    is_cue = rng.random(evidence.shape) < channel.cue_rate
    z = is_cue * evidence + channel.cue_noise * rng.standard_normal(evidence.shape)
    return z, clip, rng.random(len(clip)) >= channel.missing_rate


def monte_carlo_ideal(like: str, samples: int, seed: int) -> dict[str, float]:
    """The ideal classifier's F1 in percent (`ideal_f1`) per condition, on test clips without rendering features.

    This is how the constants in `synthetic_world` are checked; `samples` can be far more than the real set has.
    """
    kind = kind_named(like)
    rng = np.random.default_rng(seed)
    clips = draw_clips(kind, samples, rng)
    traces = {}
    for modality in MODALITIES:
        z, clip, present = draw_traces(clips, modality, slice(None), rng)
        traces[modality] = z[present], clip[present]
    posteriors = posteriors_from_traces(kind, samples, traces)
    return {condition: ideal_f1(kind, clips.label, p) for condition, p in posteriors.items()}


def ideal_f1(kind: Kind, label: np.ndarray, posterior: np.ndarray) -> float:
    """Weighted F1 in percent of the most probable decision.

    Scores: F1 non0, P(y > 0) against P(y < 0) on clips with y != 0. Emotions: mean over the four binary problems.

    Args:
        label: `[N]` index into `Kind.support`.
        posterior: `[N, C]` over `Kind.support`.
    """
    if kind.label_kind == "score":
        sign = np.sign(kind.support)
        kept = sign[label] != 0
        predicted = posterior[kept] @ sign > 0
        return 100 * float(f1_score(sign[label[kept]] > 0, predicted, average="weighted"))
    binary = [f1_score(label == k, posterior[:, k] > 0.5, average="weighted") for k in range(len(EMOTIONS))]
    return 100 * float(np.mean(binary))


def label_indices(kind: Kind, labels: np.ndarray) -> np.ndarray:
    """Stored labels `[N]` or `[N, 4]` -> index into `Kind.support`, `[N]`."""
    if kind.label_kind == "emotions":
        return labels.argmax(axis=1)
    return np.searchsorted(np.array(kind.support, dtype=np.float32), labels)


def draw_lengths(kind: Kind, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Frames of `samples` clips, `[N]` int32."""
    length = np.rint(kind.median_length * np.exp(kind.length_spread * rng.standard_normal(samples)))
    return np.clip(length, SHORTEST, kind.steps).astype(np.int32)


def _stratified_labels(prior: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Systematic sample: each clip's label has distribution `prior`, and counts differ from N p(y) by less than 1."""
    quantiles = (np.arange(samples) + rng.random()) / samples
    label = np.searchsorted(np.cumsum(prior), quantiles, side="right")
    return rng.permutation(np.minimum(label, len(prior) - 1))


def _draw_groups(kind: Kind, label: np.ndarray, groups: int, lean: float, rng: np.random.Generator) -> np.ndarray:
    """A speaker or topic per clip, `[N]`, with P(group | y) proportional to exp(lean * affinity).

    Given y, so that p(y) stays what it is.
    """
    p_gc = np.exp(lean * kind.affinity(groups))
    cumulative_gc = np.cumsum(p_gc / p_gc.sum(axis=0), axis=0)
    below = cumulative_gc[:, label] < rng.random(len(label))
    return np.minimum(below.sum(axis=0), groups - 1)


def _render_split(world: World, clips: Clips, split: str, rngs: Mapping[str, np.random.Generator]) -> Split:
    kind = world.kind
    samples = len(clips.label)
    if kind.label_kind == "score":
        labels = np.array(kind.support, dtype=np.float32)[clips.label]
    else:
        labels = np.eye(len(EMOTIONS), dtype=np.float32)[clips.label]
    return Split(
        features={modality: _render(world, clips, modality, rngs[modality]) for modality in MODALITIES},
        lengths=np.repeat(clips.length[:, None], len(MODALITIES), axis=1),
        present=np.ones((samples, len(MODALITIES)), dtype=bool),
        labels=labels,
        ids=[f"synthetic-{kind.name}/{split}/{i:06d}" for i in range(samples)],
    )


def _render(world: World, clips: Clips, modality: str, rng: np.random.Generator) -> np.ndarray:
    """Features `[R, d]` float32."""
    channel, directions = CHANNELS[modality], world.directions[modality]
    coordinates = rng.standard_normal((clips.speaker_count, channel.speaker_rank))
    speaker_offset = channel.speaker_scale * coordinates @ directions.speaker
    features = np.empty((clips.length.sum(), channel.width), dtype=np.float32)
    stop = 0
    for start in range(0, len(clips.label), CHUNK):
        rows = slice(start, start + CHUNK)
        z, clip, present = draw_traces(clips, modality, rows, rng)
        noise = channel.rest_noise * rng.standard_normal((len(clip), channel.width))
        latent = noise + (z - noise @ directions.cues.T) @ directions.cues
        latent += speaker_offset[clips.speaker[clip] - clips.first_speaker]
        if channel.topic_scale:
            shows = rng.random(len(clip)) < channel.topic_rate
            latent[shows] += channel.topic_scale * directions.topics[clips.topic[clip[shows]]]
        first, stop = stop, stop + len(clip)
        features[first:stop] = world.sensors[modality].measure(latent) * present[:, None]
    return features


def _constants(kind: Kind) -> dict[str, object]:
    """The generator's constants, JSON-able."""
    return {
        "world_seed": WORLD_SEED,
        "speaker_lean": SPEAKER_LEAN,
        "topic_lean": TOPIC_LEAN,
        "topics": TOPICS,
        "channels": {modality: asdict(channel) for modality, channel in CHANNELS.items()},
        "kind": {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(kind).items()},
    }
