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


@pytest.mark.parametrize("data", [b"", b"not a pickle\n", pickle.dumps(CONTENT)[:200], b"\x80\x04]."[:-1]])
def test_what_is_not_a_whole_pickle(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UserError, match=r"a\.pkl: not a whole pickle"):
        restricted_pickle.load(write(tmp_path, data))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.pkl: no such file"):
        restricted_pickle.load(tmp_path / "nothing.pkl")
    with pytest.raises(UserError, match="is a folder"):
        restricted_pickle.load(tmp_path)
