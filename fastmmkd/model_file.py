"""An exported model: `model.safetensors`, parameters with the normalisation statistics that they were trained under."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fastmmkd.data.batches import Normalisation
from fastmmkd.distributed import barrier, rank
from fastmmkd.errors import UserError
from fastmmkd.files import replacing
from fastmmkd.modalities import MODALITIES
from fastmmkd.run_folder import MODEL_FILE

NORMALISATION = "normalisation"


def export_model(
    state: Mapping[str, torch.Tensor], normalisation: Normalisation, directory: Path, facts: dict[str, str]
) -> None:
    """Write `model.safetensors`: a model's parameters under their names, and `normalisation.<modality>.mean|std`."""
    if rank() == 0:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        for modality in MODALITIES:
            for name, value in zip(("mean", "std"), normalisation[modality], strict=True):
                tensors[f"{NORMALISATION}.{modality}.{name}"] = torch.from_numpy(np.asarray(value, np.float64))
        with replacing(directory / MODEL_FILE) as temporary:
            save_file(tensors, str(temporary), metadata=facts)
    barrier()


def read_facts(directory: Path) -> dict[str, str]:
    """What `export_model` was told about a model; empty where it was told nothing.

    Raises:
        UserError: missing, or not such a file.
    """
    path = directory / MODEL_FILE
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not an exported model: {error}") from None


def import_model(directory: Path) -> tuple[dict[str, torch.Tensor], Normalisation]:
    """Read `model.safetensors`: parameters and normalisation statistics.

    Raises:
        UserError: missing, or not such a file.
    """
    path = directory / MODEL_FILE
    if not path.exists():
        raise UserError(f"{path}: no such file; expected a trained model")
    try:
        tensors = load_file(str(path))
        normalisation = {
            m: (
                tensors.pop(f"{NORMALISATION}.{m}.mean").numpy(),
                tensors.pop(f"{NORMALISATION}.{m}.std").numpy(),
            )
            for m in MODALITIES
        }
    except (SafetensorError, KeyError, OSError) as error:
        raise UserError(f"{path}: not an exported model: {error}") from None
    return tensors, normalisation
