"""What the measurements of single kernels have in common: which operations, precisions and sizes come first."""

from __future__ import annotations

import argparse
import math
import time

import torch

from fastmmkd.errors import UserError
from fastmmkd.ops import OPERATIONS

BY_IMPORTANCE = tuple(op.name for op in OPERATIONS.values() if {"triton", "cuda"} & set(op.kernels))
"""Operations that have kernels for a GPU, those first that most of a training step goes into."""

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
"""What most GPUs train in comes first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, and for how long."""
    parser.add_argument("--op", nargs="+", metavar="OP", default=list(BY_IMPORTANCE), help="these operations")
    parser.add_argument("--dtype", metavar="A,B", default=",".join(PRECISIONS), help="of bf16, fp32, fp16")
    parser.add_argument(
        "--main", action="store_true", help="only at the sizes that most of the papers' training runs at"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="N", help="stop after as many")


def operations(args: argparse.Namespace) -> list[str]:
    """Those of `--op`, the most important first.

    Raises:
        UserError: one does not exist.
    """
    for op in args.op:
        if op not in BY_IMPORTANCE:
            raise UserError(f"--op {op}: no such operation; expected some of {', '.join(BY_IMPORTANCE)}")
    return [op for op in BY_IMPORTANCE if op in args.op]


def precisions(args: argparse.Namespace) -> list[torch.dtype]:
    """Those of `--dtype`, the most important first.

    Raises:
        UserError: one does not exist.
    """
    wanted = [name.strip() for name in args.dtype.split(",")]
    for name in wanted:
        if name not in PRECISIONS:
            raise UserError(f"--dtype {name}: no such precision; expected some of {', '.join(PRECISIONS)}")
    return [dtype for name, dtype in PRECISIONS.items() if name in wanted]


def end(args: argparse.Namespace) -> float:
    """When `--seconds` are over, by `time.monotonic`.

    Raises:
        UserError: not more than 0.
    """
    if not args.seconds > 0:
        raise UserError(f"--seconds {args.seconds:g}: expected more than 0")
    return time.monotonic() + args.seconds
