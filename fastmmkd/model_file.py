"""An exported model: `model.safetensors`, parameters with the normalisation statistics that they were trained under.

Its metadata hold, beside what is said about the model, `sha256`: of the tensors and of all that the header says of
them. The file is a function of what it holds, to the last byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fastmmkd.data.batches import Normalisation
from fastmmkd.distributed import barrier, rank
from fastmmkd.errors import UserError
from fastmmkd.files import refuse_special, replacing
from fastmmkd.modalities import MODALITIES
from fastmmkd.run_folder import MODEL_FILE

NORMALISATION = "normalisation"
METADATA, HASH = "__metadata__", "sha256"


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
            temporary.write_bytes(serialised(tensors, facts))
    barrier()


def serialised(tensors: dict[str, torch.Tensor], facts: Mapping[str, str]) -> bytes:
    """A safetensors file of contiguous tensors on the CPU; its metadata: `facts` by name, and the hash of it all."""
    header, data = _parts(save(tensors))
    header[METADATA] = dict(sorted(facts.items()))
    header[METADATA][HASH] = _hash(header, data)
    text = _compact(header)
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return b"".join((len(text).to_bytes(8, "little"), text, data))


def _parts(file: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header, and the tensors' bytes, of a file that safetensors can read."""
    size = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + size]), memoryview(file)[8 + size :]


def _hash(header: dict[str, Any], data: memoryview) -> str:
    facts = {key: value for key, value in header[METADATA].items() if key != HASH}
    digest = hashlib.sha256(_compact(header | {METADATA: facts}))
    digest.update(data)
    return digest.hexdigest()


def _compact(header: dict[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def _read(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a model that is what was exported (about a second per GB).

    Raises:
        UserError: missing, not such a file, or not what was written.
    """
    path = directory / MODEL_FILE
    try:
        refuse_special(path, "a trained model")
        file = path.read_bytes()
        tensors = load(file)
        header, data = _parts(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a trained model") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not an exported model: {error}") from None
    facts = header.get(METADATA, {})
    if HASH not in facts:
        raise UserError(f"{path}: not an exported model: its metadata have no {HASH}, as an earlier version wrote it")
    if facts[HASH] != _hash(header, data):
        raise UserError(f"{path}: a damaged model, it is not what was written")
    return tensors, facts


def check_model(directory: Path) -> None:
    """Hold a model to its hash.

    Raises:
        UserError: missing, not such a file, or not what was written.
    """
    _read(directory)


def read_facts(directory: Path) -> dict[str, str]:
    """What `export_model` was told about a model; empty where it was told nothing.

    Raises:
        UserError: as `check_model`.
    """
    return {key: value for key, value in _read(directory)[1].items() if key != HASH}


def import_model(directory: Path) -> tuple[dict[str, torch.Tensor], Normalisation]:
    """Read `model.safetensors`: parameters and normalisation statistics.

    Raises:
        UserError: as `check_model`; or a tensor, which is named, holds what no training leaves: weights that are not
            floating-point or not finite, statistics that are not `[d]`, or a standard deviation that is not positive.
    """
    tensors, _ = _read(directory)
    path = directory / MODEL_FILE
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {name} is {_dtype(tensor)}, expected floating-point numbers")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinity, expected finite numbers")
    return tensors, {m: _statistics(tensors, m, path) for m in MODALITIES}


def _statistics(tensors: dict[str, torch.Tensor], modality: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation `[d]` of a modality, taken out of the tensors."""
    names = [f"{NORMALISATION}.{modality}.{moment}" for moment in ("mean", "std")]
    if lost := [name for name in names if name not in tensors]:
        raise UserError(f"{path}: not an exported model: there is no {lost[0]}")
    mean, std = (tensors.pop(name).double().numpy() for name in names)
    if mean.ndim != 1 or not len(mean) or mean.shape != std.shape:
        raise UserError(f"{path}: {names[0]} and std are {list(mean.shape)} and {list(std.shape)}, expected [d] each")
    if not (std > 0).all():
        i = int(np.argmin(std > 0))
        raise UserError(f"{path}: {names[1]}[{i}] is {std[i]:g}, expected a positive number")
    return mean, std


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
