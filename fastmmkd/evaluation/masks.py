"""The protocol's test masks for other programs: `fastmmkd data masks`. docs/protocol.md describes the file."""

from __future__ import annotations

import io
import json
from pathlib import Path

import h5py
import numpy as np
import torch

from fastmmkd.blocks import Config
from fastmmkd.data.batches import ResidentSplit, scaling
from fastmmkd.data.checked_hdf5 import fixed, set_text
from fastmmkd.data.dataset import Dataset
from fastmmkd.files import replacing
from fastmmkd.modalities import CONDITIONS, MODALITIES, condition_modalities

FORMAT, VERSION = "fastmmkd masks", 1


def frames_that_stay(config: Config, dataset: Dataset) -> dict[float, list[np.ndarray]]:
    """Ratio p of the sweep -> per modality `[R_m]` bool, which frames of the test split are there.

    Frames are those of `Split.features`: packed, one sample's after the other's. All modalities are kept; a frame that
    is all zero in the data is never there.
    """
    # What may be attended to is what is there, whatever the config's network is told.
    told = config.model.model_copy(update={"attention_mask": "missing", "masked_layers": "all"})
    test = dataset.splits["test"]
    shown = ResidentSplit(
        test,
        scaling(config.data, dataset),
        config.model_copy(update={"model": told}),
        torch.device("cpu"),
        torch.float32,
    )
    samples, exact = torch.arange(len(test)), config.eval.ratio == "exact"
    masks = {}
    for index, p in enumerate(config.eval.sweep):
        inputs = shown.evaluation_batch(samples, (True, True, True), p, config.eval.seed, index, exact)
        masks[p] = [
            mask[0].numpy()[test.present[layout.sample[0].numpy(), m]]  # rows of a modality that a sample lacks
            for m, (mask, layout) in enumerate(zip(inputs.masks, inputs.layouts, strict=True))
        ]
    return masks


def export(config: Config, dataset: Dataset, path: Path) -> None:
    """Write the masks that a config's evaluation uses on the test split of a data set.

    Raises:
        UserError: the file cannot be written.
    """
    test = dataset.splits["test"]
    image = io.BytesIO()
    with h5py.File(image, "w", libver=("v110", "v110")) as file:
        set_text(file, "format", FORMAT)
        file.attrs["version"] = VERSION
        set_text(file, "data_hash", dataset.content_hash)
        set_text(file, "modalities", json.dumps(MODALITIES))
        set_text(file, "ratio", config.eval.ratio)
        file.attrs["seed"] = config.eval.seed
        file["ids"], file["present"], file["lengths"] = fixed(test.ids), test.present, test.lengths
        for condition in CONDITIONS:
            kept = np.array(condition_modalities(condition))
            group = file.create_group(f"conditions/{condition}")
            group["kept"], group["samples"] = kept, test.tested(condition)
        for index, (p, of_modalities) in enumerate(frames_that_stay(config, dataset).items()):
            group = file.create_group(f"sweep/{index}")
            group.attrs["p"] = p
            for modality, stays in zip(MODALITIES, of_modalities, strict=True):
                group.create_dataset(modality, data=stays, **({"compression": "gzip"} if len(stays) else {}))
    with replacing(path) as part:
        part.write_bytes(image.getbuffer())
