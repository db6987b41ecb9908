"""The restricted unpickler: everything that NumPy writes, nothing that runs."""

from __future__ import annotations

import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from fastmmkd.data.importers import restricted_pickle
from fastmmkd.data.importers.array_in_file import ArrayInFile
from fastmmkd.errors import UserError

CONTENT = {
    "train": {
        "floats": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "strings": np.array([b"ab", b"c"]),
        "unicode": np.array(["ü", "b"]),
        "objects": np.array(["text", 3, None], dtype=object),
        "scalar": np.float32(1.5),
        "lengths": [np.int64(3), 4],
        "big endian": np.arange(3, dtype=">i4"),
        "plain": (1, 2.5, True, None, "ü", b"\xff", {1}, frozenset({2}), OrderedDict(a=1), 1j, bytearray(b"x")),
    }
}


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "a.pkl"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_containers_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    back = restricted_pickle.load(write(tmp_path, pickle.dumps(CONTENT, protocol)))["train"]
    for key, value in CONTENT["train"].items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(back[key], value)
            assert back[key].dtype.newbyteorder("=") == value.dtype.newbyteorder("=")
        else:
            assert back[key] == value


@pytest.mark.parametrize(("old", "new"), [(b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy._core.")])
def test_files_of_numpy_1_and_2(tmp_path: Path, old: bytes, new: bytes) -> None:
    data = pickle.dumps(np.arange(3), protocol=2)  # names are plain lines there
    back = restricted_pickle.load(write(tmp_path, data.replace(old, new)))
    assert back.tolist() == [0, 1, 2]


def test_strings_of_python_2(tmp_path: Path) -> None:
    assert restricted_pickle.load(write(tmp_path, b"U\x03ab\xe9.")) == "abé"


class Malicious:
    """Runs a shell command when it is unpickled the ordinary way."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_refused_by_name_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "ran"
    data = pickle.dumps({"train": Malicious(marker)}, protocol)
    with pytest.raises(UserError, match=r"a\.pkl: refused, the pickle asks for (posix|nt)\.system") as error:
        restricted_pickle.load(write(tmp_path, data))
    assert "\n" not in str(error.value)
    assert not marker.exists()
    pickle.loads(data)  # the test would otherwise pass with a harmless file
    assert marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "builtins __import__",
        "builtins type",
        "numpy load",
        "numpy.lib.npyio load",
        "numpy._core.multiarray fromfile",
        "numpy.f2py.crackfortran myeval",
        "functools partial",
        "operator attrgetter",
        "pickle loads",
        "os.path join",
        "torch.storage _load_from_bytes",
        "copyreg _reconstructor",
        "numpy ndarray.tofile",
    ],
)
def test_everything_else_is_refused(tmp_path: Path, name: str) -> None:
    module, attribute = name.split()
    data = b"\x80\x04" + b"".join(
        pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode() for part in (module, attribute)
    )
    with pytest.raises(UserError, match=f"asks for {module}.{attribute};"):
        restricted_pickle.load(write(tmp_path, data + pickle.STACK_GLOBAL + b"."))


def test_a_persistent_id_is_refused(tmp_path: Path) -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return "elsewhere" if obj == 1 else None

    buffer = io.BytesIO()
    Pickler(buffer).dump([1])
    with pytest.raises(UserError, match="persistent id 'elsewhere'"):
        restricted_pickle.load(write(tmp_path, buffer.getvalue()))


def test_other_codecs_are_refused(tmp_path: Path) -> None:
    data = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-7\x86R."
    with pytest.raises(UserError, match=r"refuses _codecs\.encode with 'utf-7'"):
        restricted_pickle.load(write(tmp_path, data))


@pytest.mark.parametrize("data", [b"not a pickle\n", pickle.dumps(CONTENT)[:200], b"\x80\x04]."[:-1]])
def test_what_is_not_a_whole_pickle(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UserError, match=r"a\.pkl: not a whole pickle"):
        restricted_pickle.load(write(tmp_path, data))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.pkl: no such file"):
        restricted_pickle.load(tmp_path / "nothing.pkl")
    with pytest.raises(UserError, match="is a folder"):
        restricted_pickle.load(tmp_path)


LARGE = {
    "floats": np.random.default_rng(0).normal(size=(40, 7, 3)),
    "fortran": np.asfortranarray(np.random.default_rng(1).normal(size=(40, 7, 3)).astype(np.float32)),
    "transposed": np.random.default_rng(2).normal(size=(7, 40, 3)).transpose(1, 0, 2),
    "big endian": np.arange(300, dtype=">i8"),
}


class TestLargeArrays:
    @pytest.fixture(autouse=True)
    def _from_few_bytes_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(restricted_pickle, "LARGE", 500)

    @pytest.mark.parametrize("frame", [None, 16])
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_they_are_what_was_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int, frame: int | None
    ) -> None:
        buffer = io.BytesIO()
        pickler = pickle._Pickler(buffer, protocol)  # its frames can be made small, so that arrays lie outside of them
        if frame:
            monkeypatch.setattr(pickle._Framer, "_FRAME_SIZE_TARGET", frame)
        pickler.dump([LARGE, LARGE["floats"]])
        back, again = restricted_pickle.load(write(tmp_path, buffer.getvalue()))
        for key, array in LARGE.items():
            np.testing.assert_array_equal(np.asarray(back[key]), array)
            assert np.asarray(back[key]).dtype == array.dtype
            assert back[key].shape == array.shape
        assert again is back["floats"]
        lies_as_it_is = protocol == 3 or (protocol > 3 and frame is not None)
        assert isinstance(again, ArrayInFile) == lies_as_it_is

    def test_slices_are_read(self, tmp_path: Path) -> None:
        array = stored(tmp_path, LARGE["floats"])
        assert isinstance(array, ArrayInFile)
        assert (len(array), array.ndim, array.dtype) == (40, 3, np.float64)
        for rows in (slice(0, 5), slice(35, 99), slice(7, 7), slice(None), slice(-3, None), slice(1, 20, 4)):
            np.testing.assert_array_equal(array[rows], LARGE["floats"][rows])
        assert np.asarray(array, np.float32).dtype == np.float32

    def test_a_file_that_becomes_shorter(self, tmp_path: Path) -> None:
        array = stored(tmp_path, LARGE["floats"])
        os.truncate(tmp_path / "a.pkl", 1000)
        with pytest.raises(UserError, match=r"a\.pkl: became shorter while it was read"):
            np.asarray(array)

    def test_more_bytes_than_the_file_has(self, tmp_path: Path) -> None:
        data = b"\x80\x04" + pickle.BINBYTES8 + (1 << 50).to_bytes(8, "little") + b"x."
        with pytest.raises(UserError, match=r"not a whole pickle file \(EOFError"):
            restricted_pickle.load(write(tmp_path, data))


def stored(tmp_path: Path, array: np.ndarray) -> object:
    """As Python 2 wrote it, for whom bytes were strings of any length."""
    state = (1, array.shape, array.dtype, False)
    head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n("
    shape = b"".join(b"I%d\n" % n for n in state[1])
    dtype = b"cnumpy\ndtype\n(S'%s'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb" % array.dtype.str[1:].encode()
    raw = pickle.BINSTRING + array.nbytes.to_bytes(4, "little") + array.tobytes()
    return restricted_pickle.load(write(tmp_path, head + shape + b"t" + dtype + b"I00\n" + raw + b"tb."))


def reduced(module: str, name: str, *arguments: bytes) -> bytes:
    """Opcodes that call a function."""
    return b"c%s\n%s\n(" % (module.encode(), name.encode()) + b"".join(arguments) + b"tR"


FLOATS = reduced("numpy", "dtype", b"S'f8'\n")
OBJECTS = reduced("numpy", "dtype", b"S'O8'\n")
EMPTY = reduced("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\n(I0\ntS'b'\n")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (reduced("numpy", "ndarray", b"(I3\ntS'O'\nS'0123456701234567'\n"), "not callable"),
        (reduced("numpy", "dtype", b"S'f8,O'\n"), "asks for an array of 'f8,O'"),
        (reduced("numpy", "dtype", b"S'V8'\n"), "asks for an array of 'V8'"),
        (reduced("numpy", "dtype", b"(lS'O'\na"), r"asks for an array of \['O'\]"),
        (EMPTY + b"(I1\n(I3\nt" + OBJECTS + b"I00\nS'012345670123456701234567'\ntb", "not in a list of as many"),
        (EMPTY + b"(I1\n(I3\nt" + FLOATS + b"I00\nS'01234567'\ntb", r"8 bytes for \[3\] of float64"),
        (EMPTY + b"(I1\n(I-1\nI-1\nt" + FLOATS + b"I00\nS'01234567'\ntb", "an array of shape"),
        (EMPTY + b"(I1\n(I1000000000000\nt" + FLOATS + b"I00\nS''\ntb", "0 bytes for"),
        (b"ccollections\nOrderedDict\n)R}S'a'\nI1\nsb", "asks for a state of OrderedDict"),
        (b"c_codecs\nencode\n}S'__defaults__'\n)sb", "asks for a state of function"),
    ],
)
def test_arrays_are_made_of_nothing_but_their_bytes(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        restricted_pickle.load(write(tmp_path, data + b"."))
    assert "\n" not in str(error.value)
