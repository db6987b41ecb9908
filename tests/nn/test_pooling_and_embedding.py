import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.nn.embedding import sinusoidal_positions, temporal_windows
from fastmmkd.nn.pooling import masked_adaptive_mean


@settings(deadline=None, max_examples=25)
@given(length=st.integers(1, 20), steps=st.integers(1, 20))
def test_without_a_mask_it_is_pytorchs_adaptive_pooling(length, steps) -> None:
    x = torch.randn(1, 2, length, 3, dtype=torch.float64)
    pooled, mask = masked_adaptive_mean(x, torch.ones(1, 2, length, dtype=torch.bool), steps)
    expected = torch.nn.functional.adaptive_avg_pool1d(x[0].transpose(1, 2), steps).transpose(1, 2)
    torch.testing.assert_close(pooled[0], expected)
    assert mask.all()


def test_masked_frames_are_left_out_and_empty_bins_are_zero() -> None:
    x = torch.arange(1.0, 7.0).view(1, 1, 6, 1)
    mask = torch.tensor([[[True, False, True, True, False, False]]])
    pooled, pooled_mask = masked_adaptive_mean(x, mask, 3)
    assert pooled.flatten().tolist() == [1.0, 3.5, 0.0]
    assert pooled_mask.flatten().tolist() == [True, True, False]


def test_windows_are_a_convolutions_receptive_field() -> None:
    x, weight = torch.randn(2, 7, 4), torch.randn(12, 5)
    conv = torch.nn.functional.conv1d(x.transpose(1, 2), weight.view(3, 4, 5).permute(2, 1, 0), padding=1)
    torch.testing.assert_close(temporal_windows(x) @ weight, conv.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_positions_by_hand() -> None:
    table = sinusoidal_positions(3, 5, torch.device("cpu"), torch.float64)
    assert table.shape == (3, 5)
    assert table[0].tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]
    torch.testing.assert_close(table[2, 0].item(), torch.sin(torch.tensor(2.0)).item(), rtol=1e-6, atol=1e-6)
