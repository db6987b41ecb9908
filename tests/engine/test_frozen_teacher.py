"""What a student's training does to its teacher: nothing, but to run it in the precision of the student."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_records import assert_same_run, parameters, records

from fastmmkd.data.batches import Inputs
from fastmmkd.engine import teachers
from fastmmkd.methods.corrkd import CorrKD
from fastmmkd.methods.hrlf import HRLF
from fastmmkd.methods.method import Network
from tests.engine.conftest import only_corrkd

Train = Callable[..., Path]
STUDENTS = {"corrkd": CorrKD, "hrlf": HRLF}


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif value is not None:
        for item in value:
            yield from tensors(item)


class TeacherWatch:
    """Keeps the teacher of a run, what it was asked, and what the student's graph holds on to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, student: type) -> None:
        self.teacher: Network | None = None
        self.before: dict[str, torch.Tensor] = {}
        self.with_gradients: list[bool] = []
        self.taught: list[torch.Tensor] = []
        self.saved: set[int] = set()
        """Storages that autograd saved since the teacher was loaded."""
        load, forward = teachers.load, student.forward

        def loading(*arguments: Any) -> Network:
            self.teacher = teacher = load(*arguments)
            self.before = {name: value.clone() for name, value in teacher.state_dict().items()}
            represent = teacher.represent

            def representing(inputs: Inputs) -> Any:
                self.with_gradients.append(torch.is_grad_enabled() or teacher.training)
                return represent(inputs)

            monkeypatch.setattr(teacher, "represent", representing)
            return teacher

        def forwarding(module: Any, batch: Any) -> Any:
            self.taught += tensors(batch.taught)
            return forward(module, batch)

        monkeypatch.setattr(teachers, "load", loading)
        monkeypatch.setattr(student, "forward", forwarding)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.teacher:
            self.saved.add(tensor.untyped_storage().data_ptr())
        return tensor


def test_the_teacher_is_frozen_and_leaves_no_graph(
    train_tiny: Train, raw: dict, method: str, distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = TeacherWatch(monkeypatch, STUDENTS[method])
    with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda tensor: tensor):
        run = train_tiny(raw, tmp_path / "run")
    assert_same_run(run, distilled)
    assert watch.teacher
    exported = parameters(run, phase="teacher")
    for name, value in watch.teacher.named_parameters():
        assert torch.equal(value, watch.before[name])
        assert torch.equal(value, exported[name])
        assert value.grad is None
        assert not value.requires_grad
    assert watch.with_gradients == [False], "asked once, without a graph"
    assert watch.taught
    assert all(x.grad_fn is None and not x.requires_grad for x in watch.taught)
    assert watch.saved
    assert watch.saved.isdisjoint(p.untyped_storage().data_ptr() for p in watch.teacher.parameters())


@only_corrkd
def test_in_bf16_the_teacher_is_in_bf16_too(
    train_tiny: Train, raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw["deepspeed"] |= {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    raw["train"] |= {"task": "classification-3", "select": None}
    watch = TeacherWatch(monkeypatch, CorrKD)
    run = train_tiny(raw, tmp_path / "run")
    assert watch.teacher
    assert {p.dtype for p in watch.teacher.parameters()} == {torch.bfloat16}
    assert {x.dtype for x in watch.taught} == {torch.bfloat16}
    for phase in ("teacher", ""):
        assert parameters(run, phase=phase)["head.weight"].dtype == torch.bfloat16
        for record in records(run, phase=phase):
            assert all(math.isfinite(value) for value in record["train"].values())
