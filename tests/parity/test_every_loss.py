"""What holds for every compiled loss, whatever it computes."""

import sys

import pytest
import torch

from fastmmkd import ops
from fastmmkd.ops import use_provider
from fastmmkd.testing.losses import CASES, fast, upstream
from fastmmkd.testing.parity import DEVICE, DTYPES, PROVIDER, needs, only_cpp, threads, value_and_gradients

every_loss = pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in CASES])


@every_loss
def test_no_groups(name) -> None:
    case = CASES[name](0, 3, 4)
    loss, *gradients = fast(name, case.inputs, case.constants)
    assert loss.shape == (0,)
    assert [x.shape for x in gradients] == [x.shape for x in case.inputs]


@only_cpp
@every_loss
@pytest.mark.parametrize("groups", [1, 3])
def test_the_number_of_threads_does_not_matter(name, groups) -> None:
    case = CASES[name](groups, 257, 120)
    with threads(1):
        one = fast(name, case.inputs, case.constants)
    with threads(2):
        two = fast(name, case.inputs, case.constants)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@every_loss
def test_views_of_other_tensors(name) -> None:
    case = CASES[name](3, 5, 8)
    expected = fast(name, case.inputs, case.constants)
    views = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in case.inputs]
    assert not views[0].is_contiguous()
    for actual, other in zip(fast(name, views, case.constants), expected, strict=True):
        assert torch.equal(actual, other)


@every_loss
@pytest.mark.parametrize("grad", [torch.ones(1).expand(3), torch.ones(6)[::2]])
def test_upstream_gradients_of_any_layout(name, grad) -> None:
    case = CASES[name](3, 5, 8)

    def run(grad):
        with use_provider(PROVIDER):
            return value_and_gradients(lambda *x: getattr(ops, name)(*x, *case.constants), case.inputs, grad)

    assert all(torch.equal(a, b) for a, b in zip(run(grad.to(DEVICE)), run(torch.ones(3, device=DEVICE)), strict=True))


@every_loss
def test_gradients_are_only_of_what_wants_one(name) -> None:
    case = CASES[name](2, 33, 40)
    expected = fast(name, case.inputs, case.constants)
    count = len(case.inputs)
    op = getattr(torch.ops.fastmmkd, name)
    for chosen in range(count):
        wanted = [i == chosen for i in range(count)]
        inputs = [x.clone().requires_grad_(is_wanted) for x, is_wanted in zip(case.inputs, wanted, strict=True)]
        with use_provider(PROVIDER):
            loss = getattr(ops, name)(*inputs, *case.constants)
        (gradient,) = torch.autograd.grad(loss, inputs[chosen], upstream(2))
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1 + chosen])
        sizes = [x.numel() for x in op(*case.inputs, *case.schema, wanted)[1:]]
        assert [size > 0 for size in sizes] == wanted


@every_loss
def test_without_gradients_none_is_computed(name, monkeypatch) -> None:
    case = CASES[name](2, 5, 8)
    inputs = [x.clone().requires_grad_() for x in case.inputs]
    with use_provider(PROVIDER), torch.no_grad():
        assert not getattr(ops, name)(*inputs, *case.constants).requires_grad
    asked = []
    module = sys.modules[f"fastmmkd.ops.{name}"]
    monkeypatch.setattr(module, "_declared", lambda *args: asked.append(args[-1]) or (None,))
    with use_provider(PROVIDER), torch.no_grad():
        getattr(ops, name)(*inputs, *case.constants)
    assert asked == [[False] * len(inputs)]


@every_loss
def test_the_operation_is_well_defined(name) -> None:
    case = CASES[name](2, 5, 8)
    op = getattr(torch.ops.fastmmkd, name).default
    inputs = [x.requires_grad_() for x in case.inputs]
    torch.library.opcheck(op, (*inputs, *case.schema, [True] * len(inputs)))
    torch.library.opcheck(op, (*(x.detach() for x in inputs), *case.schema, [False] * len(inputs)))


@every_loss
def test_compiles_to_one_graph(name) -> None:
    case = CASES[name](2, 5, 8)

    def run(*inputs):
        return getattr(ops, name)(*inputs, *case.constants)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        value_and_gradients(compiled, case.inputs, upstream(2)),
        value_and_gradients(run, case.inputs, upstream(2)),
        strict=True,
    ):
        assert torch.equal(actual, expected)


@every_loss
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_nothing(name, dtype) -> None:
    case = CASES[name](2, 5, 8)
    inputs = [x.to(dtype) for x in case.inputs]
    expected = fast(name, inputs, case.constants)
    with torch.autocast(DEVICE.type, DTYPES[-1]):
        results = fast(name, inputs, case.constants)
    assert results[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
