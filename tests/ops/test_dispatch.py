import importlib
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator

import pytest
import torch

import fastmmkd
from fastmmkd import ops
from fastmmkd.environment import print_environment
from fastmmkd.errors import UserError
from fastmmkd.ops import dispatch, extension, providers, reference


def test_explain_names_provider_and_reason() -> None:
    for op in ops.OPERATIONS:
        choice = ops.explain(op)
        assert choice.provider in (*ops.PROVIDERS, providers.COMPOSED)
        assert choice.reason


def test_operations_stand_in_their_order_and_declare_what_they_consist_of() -> None:
    assert list(ops.OPERATIONS)[:3] == ["cross_attention", "residual_layer_norm", "encoder_layer"]
    for op in ops.OPERATIONS.values():
        assert getattr(reference, op.name) is op.definition
        assert callable(getattr(ops, op.name))
        assert bool(op.kernels) == (op.compiled is not None)
        assert all(hasattr(torch.ops.fastmmkd, function) for function in op.functions)


@pytest.mark.skipif(not providers.HAS_TRITON or providers.TRITON_IS_OLD, reason="there is no triton for the kernels")
def test_the_kernels_provide_the_functions_that_are_declared() -> None:
    for op in ops.OPERATIONS.values():
        if "triton" in op.kernels:
            module = importlib.import_module(f"fastmmkd.kernels.{op.name}")
            assert all(callable(getattr(module, function)) for function in op.functions)


def test_a_misspelt_operation_is_one_line_with_the_nearest() -> None:
    for ask in (ops.operation, ops.explain):
        with pytest.raises(UserError, match=r"^crossattention: not an operation; did you mean cross_attention\?$"):
            ask("crossattention")
    with pytest.raises(UserError, match=r"^xyz: not an operation; expected one of cross_attention, residual"):
        ops.explain("xyz")


FRAME_MEAN = """
from fastmmkd.ops.dispatch import implementation
from fastmmkd.ops.operation import Op

def frame_mean(x):
    return implementation(OP, x)(x)

OP = Op("frame_mean", lambda x: x.mean(2), place=15)
"""


@pytest.fixture
def frame_mean(tmp_path, monkeypatch) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """An operation without kernels, as CONTRIBUTING has one added: a file in the folder, and nothing else."""
    (tmp_path / "frame_mean.py").write_text(FRAME_MEAN)
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
    ops._collect()
    yield ops.frame_mean  # type: ignore[attr-defined]
    del ops.OPERATIONS["frame_mean"], ops.frame_mean, sys.modules["fastmmkd.ops.frame_mean"]  # type: ignore[attr-defined]


def test_an_operation_without_kernels_is_run_by_its_definition(frame_mean, monkeypatch, capsys) -> None:
    assert list(ops.OPERATIONS)[:3] == ["cross_attention", "frame_mean", "residual_layer_norm"]
    x = torch.arange(6.0).view(1, 1, 3, 2)
    assert torch.equal(frame_mean(x), torch.tensor([[[2.0, 3.0]]]))
    monkeypatch.setattr(extension, "missing", "")
    expected = dispatch.Choice("frame_mean", "reference", "frame_mean has no kernels")
    assert ops.explain("frame_mean", x) == expected
    print_environment()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "frame_mean" in line)
    assert re.search(r"frame_mean +reference +frame_mean has no kernels", line)
    on_a_gpu(monkeypatch, (9, 0), True)
    assert ops.explain("frame_mean", "cuda") == expected
    with ops.use_provider("cpp"), pytest.raises(UserError, match=r"^use_provider=cpp: frame_mean cannot run: frame_m"):
        frame_mean(x)
    with ops.use_provider("reference"):
        assert frame_mean(x).shape == (1, 1, 2)


def test_forcing_the_reference_by_environment_or_block(monkeypatch) -> None:
    monkeypatch.setenv("FASTMMKD_PROVIDER", "reference")
    assert ops.explain("js_divergence").reason == "forced by FASTMMKD_PROVIDER"
    with ops.use_provider("reference"):
        assert ops.explain("js_divergence").reason == "forced by use_provider"


def test_a_provider_that_cannot_run_fails_loudly(monkeypatch) -> None:
    monkeypatch.setenv("FASTMMKD_PROVIDER", "cuda")
    with pytest.raises(
        UserError, match="FASTMMKD_PROVIDER=cuda: js_divergence cannot run: cuda has no kernels for cpu"
    ):
        ops.js_divergence(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))
    monkeypatch.setenv("FASTMMKD_PROVIDER", "tritn")
    with pytest.raises(UserError, match="not a provider; expected one of triton, cuda, cpp, reference"):
        ops.explain("js_divergence")
    with pytest.raises(UserError, match="not a provider"), ops.use_provider("fast"):
        pass


def test_why_the_extension_does_not_run(monkeypatch) -> None:
    x, half = torch.zeros(2), torch.zeros(2, dtype=torch.float16)
    monkeypatch.setattr(extension, "missing", "")
    assert ops.explain("residual_layer_norm", x).provider == "cpp"
    assert (
        ops.explain("residual_layer_norm", x, half).reason
        == "cpp computes in float32 and bfloat16 here, not in float16"
    )
    monkeypatch.undo()
    monkeypatch.setattr(extension, "missing", "the extension is not built: no C++ compiler")
    assert ops.explain("residual_layer_norm", x).provider == "reference"
    assert ops.explain("residual_layer_norm", x).reason == "the extension is not built: no C++ compiler"
    message = "use_provider=cpp: residual_layer_norm cannot run: the extension is not built"
    with ops.use_provider("cpp"), pytest.raises(UserError, match=message):
        ops.residual_layer_norm(x[None], x[None], x[None], x[None])


def test_double_precision_runs_the_reference_and_forcing_the_extension_on_it_fails(monkeypatch) -> None:
    monkeypatch.setattr(extension, "missing", "")
    x = torch.zeros(1, 2, dtype=torch.float64)
    assert ops.residual_layer_norm(x, x, x, x).dtype == torch.float64
    with ops.use_provider("cpp"), pytest.raises(UserError, match="cannot run: cpp computes in float32"):
        ops.residual_layer_norm(x, x, x, x)


def on_a_gpu(monkeypatch, capability: tuple[int, int], has_cuda: bool) -> None:
    """Have the dispatch believe in a CUDA device and an extension built for it."""
    monkeypatch.setattr(extension, "missing", "")
    monkeypatch.setattr(extension, "has_cuda", has_cuda)
    monkeypatch.setattr(providers, "HAS_TRITON", True)
    monkeypatch.setattr(providers, "TRITON_IS_OLD", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(providers, "capability", lambda device: capability)


@pytest.mark.parametrize(
    ("capability", "built", "expected"),
    [
        ((9, 0), True, {"cross_attention": "triton", "gaussian_mmd": "triton"}),
        ((8, 0), False, {"cross_attention": "triton"}),
        ((7, 5), True, {"cross_attention": "cuda", "gaussian_mmd": "reference"}),
        ((7, 0), False, {"cross_attention": "reference"}),
        ((6, 1), True, {"cross_attention": "reference"}),
    ],
)
def test_compute_capability_decides_on_a_gpu(monkeypatch, capability, built, expected) -> None:
    on_a_gpu(monkeypatch, capability, built)
    assert {op: ops.explain(op, "cuda").provider for op in expected} == expected


def test_why_a_gpu_runs_the_reference(monkeypatch) -> None:
    on_a_gpu(monkeypatch, (7, 0), True)
    reason = ops.explain("gaussian_mmd", "cuda").reason
    assert reason == "triton is not meant for compute capability 7.0; gaussian_mmd has no cuda kernels"
    on_a_gpu(monkeypatch, (7, 0), False)
    reason = ops.explain("cross_attention", "cuda").reason
    assert reason == "triton is not meant for compute capability 7.0; the extension was built without CUDA"
    with ops.use_provider("triton"):
        assert ops.explain("gaussian_mmd", "cuda").provider == "triton"
    monkeypatch.undo()
    if not torch.cuda.is_available() and not providers.TRITON_IS_OLD:
        assert ops.explain("gaussian_mmd", "cuda").reason == "there is no CUDA device"


def test_bfloat16_needs_compute_capability_8(monkeypatch) -> None:
    on_a_gpu(monkeypatch, (7, 0), True)
    attention = ops.operation("cross_attention")
    obstacle = providers.obstacle("cuda", attention, torch.device("cuda"), [torch.bfloat16])
    assert obstacle == "cuda computes in float32 and float16 here, not in bfloat16"
    on_a_gpu(monkeypatch, (8, 0), True)
    assert not providers.obstacle("cuda", attention, torch.device("cuda"), [torch.bfloat16])


def test_an_extension_that_does_not_load_is_a_reason_not_a_crash(monkeypatch) -> None:
    monkeypatch.setattr(extension.first_use, "kept", lambda: None)
    broken = type("Broken", (), {"build_info": staticmethod(lambda: {"torch": "1.0.0"})})
    monkeypatch.setitem(sys.modules, "fastmmkd._C", broken)
    monkeypatch.setattr(fastmmkd, "_C", broken, raising=False)
    assert extension._load() == (None, f"the extension was built for torch 1.0.0, this is torch {torch.__version__}")
    monkeypatch.setitem(sys.modules, "fastmmkd._C", None)
    monkeypatch.delattr(fastmmkd, "_C")
    monkeypatch.setattr(extension.first_use, "kept", lambda: None)
    assert extension._load()[1].startswith("the extension is not compiled yet")


def test_an_extension_with_unknown_symbols_is_a_reason_not_a_crash(tmp_path, monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "fastmmkd._C", raising=False)
    monkeypatch.delattr(fastmmkd, "_C", raising=False)
    monkeypatch.setattr(fastmmkd, "__path__", [str(tmp_path)])
    monkeypatch.setattr(extension.first_use, "kept", lambda: None)
    (tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    module, reason = extension._load()
    assert module is None
    assert reason.startswith("the extension does not load: ")


@pytest.mark.parametrize(
    ("of_triton", "of_numpy", "interprets"),
    [("3.6.0", "2.5.0", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.5.0", True)],
)
def test_a_triton_that_does_not_interpret_with_this_numpy(monkeypatch, of_triton, of_numpy, interprets) -> None:
    monkeypatch.setattr(providers, "INTERPRETED", True)
    pytest.importorskip("triton")
    monkeypatch.setattr(providers, "TRITON_IS_OLD", False)
    monkeypatch.setattr(providers, "TRITON", of_triton)
    monkeypatch.setattr(providers.np, "__version__", of_numpy)
    monkeypatch.setattr(providers, "_interpreter_obstacle", providers._interpreter_obstacle.__wrapped__)
    reason = providers.obstacle("triton", ops.operation("js_divergence"), torch.device("cpu"), [])
    expected = (
        f"triton {of_triton} does not interpret (TRITON_INTERPRET=1) with numpy {of_numpy}; "
        "install triton >= 3.7.1 or numpy < 2.4"
    )
    assert reason == ("" if interprets else expected)


def test_a_triton_that_is_too_old_is_left_for_others(monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(providers, "TRITON", "3.2.0")
    monkeypatch.setattr(providers, "TRITON_IS_OLD", True)
    monkeypatch.setattr(providers, "INTERPRETED", False)
    monkeypatch.setattr(providers, "_UNAVAILABLE", {**providers._UNAVAILABLE, "cuda": lambda device: "not here"})
    device, op = torch.device("cuda"), ops.operation("cross_attention")
    expected = "triton 3.2.0 is too old for the kernels, which need 3.6 (torch 2.10)"
    assert providers.obstacle("triton", op, device, []) == expected
    assert providers.preferred(op, device, []) == "reference"
