"""A trained model, ready to use: `fastmmkd.load(run_dir)`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fastmmkd.blocks import Config
from fastmmkd.config import parse_config
from fastmmkd.data.batches import Normalisation, ResidentSplit
from fastmmkd.data.integrity import validate_frames
from fastmmkd.data.store import EMOTIONS, Dataset, Split
from fastmmkd.errors import UserError
from fastmmkd.evaluation.protocol import Evaluator, Scenario
from fastmmkd.files import replacing
from fastmmkd.methods import METHODS
from fastmmkd.methods.method import Network
from fastmmkd.modalities import MODALITIES
from fastmmkd.model_file import import_model
from fastmmkd.nn.models import load_model
from fastmmkd.ops import extension
from fastmmkd.run_folder import RUN_FILE, read_record, seed_directory, seeds_with_model
from fastmmkd.tasks import Task

COMPLETE = (True, True, True)


@dataclass
class Predictor:
    """One trained model with the normalisation it was trained under."""

    config: Config
    seed: int
    module: Network
    normalisation: Normalisation
    feature_dims: tuple[int, ...]
    device: torch.device

    @property
    def task(self) -> Task:
        return self.config.task

    def predict(self, split: Split, source: str = "data") -> np.ndarray:
        """Predictions of every sample with what it has; missing modalities and frames are fine.

        Args:
            split: see `fastmmkd.data.store.Split`; `Split.from_padded` makes one of padded arrays.
            source: stands for the data in an error message.

        Returns:
            As `fastmmkd.tasks.Task` documents: `[N]` scores or `[N, C]` probabilities, float64.

        Raises:
            UserError: no samples, features of another width than the model was trained on, features that are not
                finite (named by modality, row and id) or do not fit the split's lengths, or a prediction that is not.
        """
        if not len(split):
            raise UserError(f"{source}: has no samples, expected at least one to predict")
        self._check_widths(split, source)
        validate_frames(source, split, self.feature_dims)
        shape = (len(split),) if self.task.has_scores else (len(split), len(EMOTIONS))
        unlabelled = replace(split, labels=np.zeros(shape, np.float32))  # whatever labels the data have
        predictions = self.evaluator(unlabelled, source).run(self.module, Scenario(COMPLETE), np.arange(len(split)))[0]
        if not (finite := np.isfinite(predictions).reshape(len(split), -1).all(axis=1)).all():
            i = int(np.argmin(finite))
            named = f" ({split.ids[i]!a})" if i < len(split.ids) else ""
            raise UserError(
                f"{source}: sample {i}{named} is predicted as {predictions[i]}, expected a finite "
                "prediction; are its features of the scale that the model was trained on?"
            )
        return predictions

    def evaluator(self, split: Split, source: str = "data") -> Evaluator:
        """The split on the model's device, standardised as in training, for `fastmmkd.evaluation.protocol`.

        Raises:
            UserError: features of another width than the model was trained on.
        """
        self._check_widths(split, source)
        resident = ResidentSplit(split, self.normalisation, self.config, self.device, torch.float32)
        return Evaluator(resident, split.labels, split.present, self.task, self.config.eval)

    def _check_widths(self, split: Split, source: str) -> None:
        for modality, dim in zip(MODALITIES, self.feature_dims, strict=True):
            if modality not in split.features:
                raise UserError(f"{source}: has no features of {modality}, expected [0, {dim}] where it is missing")
            width = split.features[modality].shape[-1]
            if width != dim:
                raise UserError(f"{source}: {modality} has {width} features, the model was trained on {dim}")


def load(run: Path | str, seed: int | None = None, device: str = "cpu") -> Predictor:
    """Load a trained model in fp32, in evaluation mode.

    Args:
        run: a run's folder (what `train.py --out` named).
        seed: which of its seeds; by default the first one that has a model.
        device: where to put it, as torch names it: `"cpu"`, `"cuda"`, `"cuda:1"`.

    Raises:
        UserError: not a run, no model of that seed, or no such device.
    """
    run, place = Path(run), _device(device)
    config = parse_config(read_record(run)["config"], str(run / RUN_FILE))
    seeds = seeds_with_model(run, config.train.seeds)
    if not seeds or (seed is not None and seed not in seeds):
        wanted = f"seed {seed}" if seed is not None else "any seed"
        raise UserError(f"{run}: no trained model of {wanted}; it has {', '.join(map(str, seeds)) or 'none'}")
    seed = seeds[0] if seed is None else seed
    parameters, normalisation = import_model(seed_directory(run, seed))
    extension.ensure()
    feature_dims = tuple(len(normalisation[modality][0]) for modality in MODALITIES)
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are read
        module = METHODS[config.method].network(config, feature_dims)
    try:
        load_model(module, parameters)
    except RuntimeError:
        raise UserError(f"{seed_directory(run, seed)}: the model is not of the config in {run / RUN_FILE}") from None
    return Predictor(config, seed, module.float().eval().to(place), normalisation, feature_dims, place)


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"device {name!r}: cannot be used ({said[:100]}); expected 'cpu', or 'cuda' with a GPU"
        ) from None


def load_all(run: Path | str, device: str = "cpu") -> list[Predictor]:
    """Every trained seed of a run, see `load`."""
    first = load(run, device=device)
    seeds = seeds_with_model(Path(run), first.config.train.seeds)
    return [first, *(load(run, seed, device) for seed in seeds[1:])]


def write_predictions(predictors: Sequence[Predictor], dataset: Dataset, out: Path) -> int:
    """Predict every sample of a data set into a CSV file, written whole; returns the number of rows.

    Columns: split; id; present ("lav" where all modalities are there); frames of each modality, which are real, whether
    they say something or not; `score`, or `class` (not of `emotions-binary`) and one probability per class, the means
    of the predictors; `spread`, where there are several of them: the standard deviation of what they say, of the score
    or, of several probabilities, the largest; `label`, where the data have any.

    Args:
        predictors: of one run, its seeds.
        dataset: as `fastmmkd.data.importers.samples.load` gives it.
        out: the file.
    """
    task, dims = predictors[0].task, predictors[0].feature_dims
    frames = [f"frames_{modality}" for modality in MODALITIES]
    spread = ["spread"] if len(predictors) > 1 else []
    label = ["label"] if dataset.label_kind else []
    rows = 0
    with replacing(out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "id", "present", *frames, *prediction_columns(task), *spread, *label])
        for name, split in dataset.splits.items():
            split = _with_absent(split, dims)
            said = np.stack([p.predict(split, str(dataset.path or dataset.source)) for p in predictors])
            said = said.reshape(len(predictors), len(split), -1)  # [S, N, C]
            for i, sample_id in enumerate(split.ids):
                letters = "".join(m[0] for m, there in zip(MODALITIES, split.present[i], strict=True) if there)
                mean, deviation = said[:, i].mean(0), said[:, i].std(0).max()
                writer.writerow(
                    [
                        *(name, sample_id, letters, *split.lengths[i]),
                        *([task.class_names[mean.argmax()]] if _has_class(task) else []),
                        *(f"{value:.6f}" for value in mean),
                        *([f"{deviation:.6f}"] if spread else []),
                        *([_label(split.labels[i])] if label else []),
                    ]
                )
                rows += 1
    return rows


def _with_absent(split: Split, dims: Sequence[int]) -> Split:
    """Where no sample has a modality, its width is the model's."""
    features = {
        m: split.features[m] if split.present[:, i].any() else np.zeros((0, dims[i]), np.float32)
        for i, m in enumerate(MODALITIES)
    }
    return replace(split, features=features)


def _label(label: np.ndarray) -> str:
    """A score, or the emotions that hold, joined by "+"."""
    if np.ndim(label) == 0:
        return f"{label:g}"
    return "+".join(name for name, there in zip(EMOTIONS, label, strict=True) if there > 0.5)


def _has_class(task: Task) -> bool:
    return not task.is_regression and task.problems == 1


def prediction_columns(task: Task) -> list[str]:
    """Names of what a task predicts per sample."""
    if task.is_regression:
        return ["score"]
    return [*(["class"] if _has_class(task) else []), *(f"p_{name}" for name in task.class_names)]
