import torch

from fastmmkd.ops.philox import philox, uniform


def words(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    as_tensors = [torch.tensor(v) for v in (*counter, *key)]
    return philox(tuple(as_tensors[:4]), tuple(as_tensors[4:])).tolist()


def test_known_answers() -> None:
    """The vectors that the generator's authors publish (Random123, kat_vectors, philox4x32-10)."""
    ones = 0xFFFFFFFF
    assert words((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words((ones,) * 4, (ones,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(pi, (0xA4093822, 0x299F31D0)) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_uniform_stays_below_one() -> None:
    u = uniform(torch.tensor([0, 0xFF, 0x100, 0xFFFFFFFF]))
    assert u.tolist() == [0.0, 0.0, 2.0**-24, 1.0 - 2.0**-24]
    assert u.dtype == torch.float32
