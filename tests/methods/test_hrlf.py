"""HRLF against its literal twin, both sides of L_HAL, ablations, teacher, unaligned input, two models."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from literal_hrlf import adversarial, losses

from fastmmkd.config import load_config
from fastmmkd.methods.hrlf import HRLF, METHOD, HrlfLoss, HrlfModel, HrlfNetwork
from fastmmkd.tasks import TASKS, Task
from tests.handmade import batch_of, inputs_of, network_of, student_of

DIMS, HEADS, BATCH, WIDTH = (5, 4, 3), 2, 3, 8
LABELS = {
    "regression": [0.5, -1.2, 0.0],
    "classification-2": [[1], [0], [1]],
    "classification-3": [[2], [0], [2]],
    "classification-7": [[3], [2], [3]],
    "emotions-binary": [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]],
    "emotions-4way": [[2], [0], [2]],
}


def network(task="regression", seed=0, models=1, layers=2, frf=True, **loss) -> HrlfNetwork:
    torch.manual_seed(seed)
    block = HrlfModel(width=WIDTH, heads=HEADS, encoder_layers=layers, frf=frf)
    return HrlfNetwork(block, HrlfLoss(**loss), Task(task), DIMS, models).double()


def build(task="regression", seed=0, models=1, layers=2, frf=True, **loss) -> HRLF:
    own = network(task, seed, models, layers, frf, **loss)
    return HRLF(own, HrlfLoss(statistics_width=5, **loss), WIDTH, own, models).double()


def frozen_teacher(task="regression", seed=7, frf=True) -> HrlfNetwork:
    return network(task, seed, frf=frf).eval().requires_grad_(False)


def inputs(steps=(6, 6, 6), seed=1, complete=False, masked_layers="all"):
    """A batch; where it is not complete, its last sample misses everything."""
    generator = torch.Generator().manual_seed(seed)
    features = [
        torch.randn(1, BATCH, t, d, generator=generator, dtype=torch.float64) for t, d in zip(steps, DIMS, strict=True)
    ]
    masks = [torch.rand(1, BATCH, t, generator=generator) < 0.6 for t in steps]
    for mask in masks:
        mask[0, -1] = False
        if complete:
            mask[:] = True
    features = [x * mask.unsqueeze(-1) for x, mask in zip(features, masks, strict=True)]
    if masked_layers == "first":  # a sample's first frame is padding, unless it is there
        masks += [mask | (torch.arange(t) > 0) for t, mask in zip(steps, masks, strict=True)]
    return features, masks


def samples(batch):
    """The batch as the literal twin takes it."""
    features, masks = batch
    return [([x[0, i] for x in features], [m[0, i] for m in masks]) for i in range(BATCH)]


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw_scales(seed=0, rows=BATCH):
    """`E_1, E_2, E_3` of a network."""
    return [draw(1, n, rows, d, seed=seed + k) for k, (n, d) in enumerate(((2, 3 * WIDTH), (2, 2 * WIDTH), (1, WIDTH)))]


def targets_of(task):
    return torch.tensor([LABELS[task.removesuffix("-sims")]])


def step(model, teacher, missing, complete, targets):
    """Loss and parts; the gradients are left in the parameters."""
    with torch.no_grad():
        taught = teacher.represent(inputs_of(*complete)).taught()
    loss, parts = model(batch_of(*missing, targets, taught))
    model.zero_grad()
    loss.backward()
    return loss, parts


CASES = [
    *[(task, {}) for task in LABELS],
    *[(task, {"frf": False}) for task in ("regression", "emotions-binary")],
    ("regression", {"frf_gradient": "everything"}),
    ("regression", {"hmi_negatives": "joined"}),
    ("emotions-4way", {"global_batch": False}),
]


@pytest.mark.parametrize(("task", "switches"), CASES, ids=str)
@pytest.mark.parametrize(
    ("steps", "masked_layers"), [((6, 6, 6), "all"), ((6, 6, 6), "first"), ((4, 7, 5), "all"), ((4, 7, 5), "first")]
)
def test_losses_and_gradients_equal_the_literal_twin(task, switches, steps, masked_layers) -> None:
    """The discriminators ascend the paper's `L_HAL`, everything else descends it."""
    model = build(task, lambda_frf=0.5, lambda_hmi=2.0, lambda_hal=3.0, lambda_kl=4.0, **switches)
    teacher = frozen_teacher(task, frf=switches.get("frf", True))
    missing, complete = (inputs(steps, seed, whole, masked_layers) for seed, whole in ((1, False), (2, True)))
    total, parts = step(model, teacher, missing, complete, targets_of(task))

    expected = losses(model, teacher, samples(missing), samples(complete), LABELS[task], HEADS)
    assert set(parts) == {"loss", *expected}
    for name, part in expected.items():
        torch.testing.assert_close(parts[name], part.detach().view(1) * (-1 if name == "hal" else 1))
    others = expected["task"] + 0.5 * expected.get("frf", 0.0) + 2.0 * expected["hmi"] + 4.0 * expected["kl"]
    torch.testing.assert_close(total, others - 3.0 * expected["hal"])
    torch.testing.assert_close(parts["loss"], total.detach().view(1))
    names, parameters = zip(*model.named_parameters(), strict=True)
    descended = torch.autograd.grad(others + 3.0 * expected["hal"], parameters)
    # Positions are rounded to float32, here and there after different sums.
    for name, parameter, grad in zip(names, parameters, descended, strict=True):
        grad = -grad if name.startswith("discriminators") else grad
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_gradient_reversal_serves_both_sides_of_the_adversarial_loss() -> None:
    """One backward pass: the discriminators get `-dL_HAL` and the student `+dL_HAL`, the teacher nothing."""
    model = build()
    student, teacher = [x.requires_grad_() for x in draw_scales()], draw_scales(seed=5)
    discriminators = list(model.discriminators.parameters())
    hal = adversarial(model.discriminators, [list(x[0]) for x in student], [list(x[0]) for x in teacher])
    of_student = torch.autograd.grad(hal, student, retain_graph=True)
    of_discriminators = torch.autograd.grad(hal, discriminators)

    loss = model.adversarial(student, teacher)
    torch.testing.assert_close(loss, -hal.detach().view(1))
    loss.sum().backward()
    for x, grad in zip(student, of_student, strict=True):
        torch.testing.assert_close(x.grad, grad)
        assert x.grad.abs().max() > 0
    for parameter, grad in zip(discriminators, of_discriminators, strict=True):
        torch.testing.assert_close(parameter.grad, -grad)


@pytest.mark.parametrize("gradient", ["factors", "everything"])
def test_what_the_factorization_loss_trains(gradient) -> None:
    """FRF itself in either case; what Z comes from as the paper has it alone."""
    model = network(frf_gradient=gradient)
    model.factorization(*model.represent(inputs_of(*inputs(complete=True))).factors).sum().backward()
    of_frf = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name for name in of_frf if name.startswith("frf.")} == {f"frf.{n}" for n, _ in model.frf.named_parameters()}
    before = {name for name in of_frf if name.startswith(("embedding.", "encoders."))}
    assert bool(before) == (gradient == "everything")


def test_networks_that_tell_nothing_apart_by_hand() -> None:
    """Zero statistics: each of three bounds is `-2 ln 2`. Zero discriminators: `D = 1/2`, `L_HAL = -6 ln 2`."""
    model = build()
    with torch.no_grad():
        for parameter in (*model.statistics.parameters(), *model.discriminators.parameters()):
            parameter.zero_()
    student, teacher = draw_scales(), draw_scales(seed=5)
    assert model.mutual_information(student, teacher).item() == pytest.approx(6 * math.log(2), rel=1e-12)
    assert model.adversarial(student, teacher).item() == pytest.approx(6 * math.log(2), rel=1e-12)


def test_widths_of_the_scales() -> None:
    """`E_1 = {H, H~}`, `E_2 = {I_1, I_3}`, `E_3 = {I_2}`; without FRF they are as wide."""
    for frf in (True, False):
        found = network(frf=frf).represent(inputs_of(*inputs()))
        shapes = [tuple(e.shape) for e in found.scales]
        assert shapes == [(1, 2, BATCH, 3 * WIDTH), (1, 2, BATCH, 2 * WIDTH), (1, 1, BATCH, WIDTH)]
        assert torch.equal(found.scales[0][:, 1], found.refined)


@pytest.mark.parametrize("task", LABELS)
@pytest.mark.parametrize("frf", [True, False])
def test_a_network_by_itself_minimises_task_and_factorization(task, frf) -> None:
    model = network(task, frf=frf, lambda_frf=0.5)
    loss, parts = model(batch_of(*inputs(complete=True), targets_of(task)))
    assert set(parts) == ({"loss", "task", "frf"} if frf else {"loss", "task"})
    torch.testing.assert_close(loss.view(1), parts["task"] + (0.5 * parts["frf"] if frf else 0.0))
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("frf", "lambda_frf"), [(True, 1.0), (False, 1.0), (False, 0.0)])
def test_ablated_losses_are_left_out_with_their_parameters(task, frf, lambda_frf) -> None:
    """What is left has a gradient everywhere."""
    teacher, missing, complete = frozen_teacher(task, frf=frf), inputs(), inputs(seed=2, complete=True)
    for hmi, hal, kl in itertools.product((0.0, 1.0), repeat=3):
        model = build(task, layers=1, frf=frf, lambda_frf=lambda_frf, lambda_hmi=hmi, lambda_hal=hal, lambda_kl=kl)
        loss, parts = step(model, teacher, missing, complete, targets_of(task))
        weights = {"frf": frf and lambda_frf, "hmi": hmi, "hal": hal, "kl": kl}
        assert set(parts) == {"loss", "task"} | {name for name, weight in weights.items() if weight}
        torch.testing.assert_close(loss.view(1), sum(part for key, part in parts.items() if key != "loss"))
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        modules = {name.split(".")[0] for name, _ in model.named_parameters()}
        assert modules == {"network"} | {n for n, w in (("statistics", hmi), ("discriminators", hal)) if w}


@pytest.mark.parametrize("data", ["mosi", "mosei", "iemocap", "ict_mmmo", "mosei_literal"])
@pytest.mark.parametrize("row", METHOD.ablations)
def test_every_row_of_the_shipped_configs_trains_all_it_has(row, data) -> None:
    small = ["model.width=8", "model.heads=2", "model.encoder_layers=1", "loss.statistics_width=4"]
    config = load_config(f"configs/hrlf_{data}.json", [*METHOD.ablations[row], *small])
    features, masks = inputs()
    batch = [x.float() for x in features], masks, targets_of(config.train.task)
    if config.teacher is None:
        model = network_of(config, DIMS, seed=0)
        loss, _ = model(batch_of(*batch))
    else:
        model = student_of(config, DIMS, seed=0)
        with torch.no_grad():
            taught = network_of(config, DIMS, seed=1).represent(inputs_of(*batch[:2])).taught()
        loss, _ = model(batch_of(*batch, taught))
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("task", LABELS)
@pytest.mark.parametrize("frf", [True, False])
def test_everything_missing_is_finite(task, frf) -> None:
    """A whole batch of it."""
    features, masks = inputs()
    nothing = [torch.zeros_like(x) for x in features], [torch.zeros_like(m) for m in masks]
    model = build(task, frf=frf)
    loss, _ = step(model, frozen_teacher(task, frf=frf), nothing, inputs(complete=True), targets_of(task))
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    logits, refined = model.network.predict(inputs_of(*nothing))
    assert torch.isfinite(logits).all()
    assert torch.isfinite(refined).all()


def test_a_prediction_depends_on_its_own_sample_alone() -> None:
    """Neither on its neighbours in the batch, nor on how many there are."""
    model = network()
    features, masks = inputs()
    whole, joint = model.predict(inputs_of(features, masks))
    for i in range(BATCH):
        alone = model.predict(inputs_of([x[:, i : i + 1] for x in features], [m[:, i : i + 1] for m in masks]))
        torch.testing.assert_close(alone[0][:, 0], whole[:, i])
        torch.testing.assert_close(alone[1][:, 0], joint[:, i])


@pytest.mark.parametrize("steps", [(6, 6, 6), (4, 7, 5)])
@pytest.mark.parametrize("task", ["regression", "emotions-binary"])
@pytest.mark.parametrize("frf", [True, False])
def test_models_in_one_process_equal_models_alone(task, steps, frf) -> None:
    """S = 2 with stacked parameters, and two teachers, gives each model's loss and gradient."""
    singles = [build(task, s, frf=frf) for s in (0, 1)]
    teachers = [frozen_teacher(task, s, frf=frf) for s in (7, 8)]
    together, teachers_together = build(task, 2, models=2, frf=frf), network(task, 9, models=2, frf=frf)
    for both, alone in ((together, singles), (teachers_together, teachers)):
        with torch.no_grad():
            for name, parameter in both.named_parameters():
                parameter.copy_(torch.cat([m.get_parameter(name) for m in alone]))
    missing, complete = ([inputs(steps, seed=s + 2 * c, complete=bool(c)) for s in (3, 4)] for c in (0, 1))
    targets = torch.cat((targets_of(task), targets_of(task).flip(1)))

    def stack(pair):
        return [[torch.cat(x) for x in zip(*part, strict=True)] for part in zip(*pair, strict=True)]

    total, parts = step(together, teachers_together, stack(missing), stack(complete), targets)
    alone_total = 0.0
    for s, model in enumerate(singles):
        loss, alone = step(model, teachers[s], missing[s], complete[s], targets[s : s + 1])
        alone_total = alone_total + loss
        for name, part in alone.items():
            torch.testing.assert_close(parts[name][s : s + 1], part)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(together.get_parameter(name).grad[s : s + 1], parameter.grad)
    torch.testing.assert_close(total, alone_total)


def test_the_teacher_has_no_graph_and_does_not_change() -> None:
    model, teacher, complete = build(), frozen_teacher(), inputs(seed=2, complete=True)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    taught = teacher.represent(inputs_of(*complete))
    outputs = (*taught.scales, taught.logits, taught.refined, *taught.factors)
    assert all(x.grad_fn is None and not x.requires_grad for x in outputs)
    step(model, teacher, inputs(), complete, targets_of("regression"))
    torch.optim.SGD([*model.parameters(), *teacher.parameters()], lr=0.1).step()
    for name, parameter in teacher.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("task", ["regression", "classification-3", "emotions-binary"])
def test_a_student_that_is_its_teacher(task) -> None:
    """On the same samples the divergence is 0, and discriminators can do no better than `2 ln 2` a scale."""
    model = build(task)
    _, parts = step(model, model.network, inputs(complete=True), inputs(complete=True), targets_of(task))
    assert parts["kl"].item() == 0.0
    assert parts["hal"].item() >= 6 * math.log(2)


def test_gradient_of_the_mutual_information() -> None:
    model, teacher = build(), draw_scales(seed=5)
    student = [x.requires_grad_() for x in draw_scales()]
    assert torch.autograd.gradcheck(lambda *x: model.mutual_information(x, teacher), student)


@pytest.mark.parametrize("negatives", ["layer", "joined"])
def test_mutual_information_does_not_depend_on_the_number_of_processes(in_two_processes, negatives) -> None:
    """Averaged over two processes of 2 samples, the loss and its gradients are those of one process with 4."""
    model = build(hmi_negatives=negatives)
    parameters = list(model.statistics.parameters())
    teacher, student = draw_scales(seed=5, rows=4), draw_scales(rows=4)
    rows = [slice(0, 2), slice(2, 4)]

    def of(taught, own):
        own = [x.clone().requires_grad_() for x in own]
        loss = model.mutual_information(own, taught)
        grads = torch.autograd.grad(loss.sum(), [*own, *parameters])
        return loss.detach(), grads[:3], grads[3:]

    loss, of_student, of_statistics = of(teacher, student)
    found = in_two_processes(lambda rank: of(*([x[:, :, rows[rank]] for x in scales] for scales in (teacher, student))))
    for rank in range(2):
        torch.testing.assert_close(found[rank][0], loss)
        for grad, expected in zip(found[rank][1], of_student, strict=True):
            torch.testing.assert_close(grad / 2, expected[:, :, rows[rank]])
    for first, second, expected in zip(found[0][2], found[1][2], of_statistics, strict=True):
        torch.testing.assert_close((first + second) / 2, expected)
