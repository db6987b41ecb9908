"""How DeepSpeed's checkpoints get to disk and back: durably, and without running what a file may hold.

Imported once DeepSpeed is up (`fastmmkd.engine.device.start_deepspeed`).
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from fastmmkd.errors import UserError

DEEPSPEEDS_OWN = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
"""What DeepSpeed keeps in a checkpoint besides tensors and plain values, under any ZeRO stage: data alone."""


class CheckpointFiles(TorchCheckpointEngine):
    """What DeepSpeed's engine saves and loads its files by.

    DeepSpeed waits for other processes between files, and they for this one: what cannot be written is kept in
    `failure` until its `save_checkpoint` is over. `written` names this process's files of it.
    """

    failure: OSError | None = None
    written: tuple[str, ...] = ()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Create a folder, or note why not."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.failure = error

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file and wait until it is on the disk, or note why not."""
        self.written += (Path(path).name,)
        buffer = io.BytesIO()  # torch's own writer may end the process where the disk is full
        torch.save(state_dict, buffer)
        try:
            with open(path, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self.failure = error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file of tensors, plain values and `DEEPSPEEDS_OWN`; nothing that it names is called otherwise.

        Raises:
            UserError: it names anything else.
        """
        try:
            with torch.serialization.safe_globals(list(DEEPSPEEDS_OWN)):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError:
            raise UserError(f"{Path(path).name} holds more than a checkpoint of DeepSpeed, and was not run") from None
