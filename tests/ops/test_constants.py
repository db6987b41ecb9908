"""Constants are made once, for each device and dtype, and stay out of modules."""

import torch
from torch import nn

from fastmmkd.nn.embedding import TemporalEmbedding, sinusoidal_positions
from fastmmkd.ops.constants import constant
from tests.handmade import layout_of

CPU = torch.device("cpu")


def ramp(n: int, device: torch.device) -> torch.Tensor:
    return torch.arange(n, device=device)


def test_the_same_tensor_every_time_and_another_for_another_size_or_dtype() -> None:
    made = constant(ramp, 3, device=CPU)
    assert made.tolist() == [0.0, 1.0, 2.0]
    assert constant(ramp, 3, device=CPU) is made
    assert constant(ramp, 4, device=CPU).shape == (4,)
    assert constant(ramp, 3, device=CPU, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_made_in_inference_mode_it_still_takes_part_in_training() -> None:
    with torch.inference_mode():
        made = constant(ramp, 5, device=CPU)
    x = torch.ones(5, requires_grad=True)
    (x * made).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_compiled_module_makes_its_own() -> None:
    class Ramp(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + constant(ramp, 7, device=x.device, dtype=x.dtype)

    compiled = torch.compile(Ramp(), fullgraph=True, backend="aot_eager")
    assert compiled(torch.zeros(7)).tolist() == list(range(7))
    assert constant(ramp, 7, device=CPU).tolist() == list(range(7))


def test_positions_are_no_state() -> None:
    embedding = TemporalEmbedding(1, (4,), 6)
    before = list(embedding.state_dict())
    embedding([torch.zeros(1, 2 * 9, 4)], [layout_of(1, 2, 9)])
    assert list(embedding.state_dict()) == before
    assert not list(embedding.buffers())
    assert sinusoidal_positions(9, 6, CPU, torch.float32) is sinusoidal_positions(9, 6, CPU, torch.float32)
