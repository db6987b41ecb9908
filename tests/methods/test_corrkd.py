"""CorrKD against its literal twin, its losses by hand, its ablations, its teacher, unaligned input, several models."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from literal_corrkd import losses

from fastmmkd.config import load_config, parse_config
from fastmmkd.data.batches import ResidentSplit
from fastmmkd.data.dataset import Split
from fastmmkd.methods.corrkd import METHOD, CorrKD, CorrkdLoss, CorrkdModel, CorrkdNetwork, Representation
from fastmmkd.modalities import MODALITIES
from fastmmkd.nn.scaling import unit_length
from fastmmkd.tasks import TASKS, Task
from tests.handmade import batch_of, inputs_of, network_of, small_config_of, student_of

DIMS, HEADS, BATCH, WIDTH = (5, 4, 3), 2, 3, 8
LABELS = {
    "regression": [0.5, -0.4, 0.0],
    "classification-2": [[1], [0], [1]],
    "classification-3": [[2], [0], [2]],
    "classification-7": [[3], [2], [3]],
    "emotions-binary": [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]],
    "emotions-4way": [[2], [0], [2]],
}
"""Class 1 of 3 is absent, and one emotion holds for nobody. The scores make other classes of 2, 3 and 7 bins."""


def network(task="classification-3", seed=0, models=1, layers=2) -> CorrkdNetwork:
    torch.manual_seed(seed)
    block = CorrkdModel(width=WIDTH, heads=HEADS, encoder_layers=layers)
    return CorrkdNetwork(block, Task(task), DIMS, models).double()


def build(task="classification-3", seed=0, models=1, layers=2, **loss) -> CorrKD:
    own = network(task, seed, models, layers)
    return CorrKD(own, CorrkdLoss(statistics_width=5, **loss), own, models).double()


def frozen_teacher(task="classification-3", seed=7) -> CorrkdNetwork:
    return network(task, seed).eval().requires_grad_(False)


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


def targets_of(task):
    return torch.tensor([LABELS[task.removesuffix("-sims")]])


def step(model, teacher, missing, complete, targets):
    """Loss and parts; the gradients are left in the parameters."""
    with torch.no_grad():
        taught = teacher.represent(inputs_of(*complete))
    loss, parts = model(batch_of(*missing, targets, taught))
    model.zero_grad()
    loss.backward()
    return loss, parts


CASES = [
    *[(task, {}) for task in LABELS],
    ("classification-3", {"reduction": "sum"}),
    *[("classification-3", {"normalise": False, "reduction": reduction}) for reduction in ("mean", "sum")],
    *[(task, {"rcd": "kl"}) for task in ("regression", "classification-3", "emotions-binary")],
    *[("regression", {"prototypes": bins}) for bins in (2, 7)],
    ("emotions-4way", {"global_batch": False}),
]


@pytest.mark.parametrize(("task", "loss"), CASES, ids=str)
@pytest.mark.parametrize(
    ("steps", "masked_layers"), [((6, 6, 6), "all"), ((6, 6, 6), "first"), ((4, 7, 5), "all"), ((4, 7, 5), "first")]
)
def test_losses_and_gradients_equal_the_literal_twin(task, loss, steps, masked_layers) -> None:
    model = build(task, lambda_scd=0.5, lambda_cpd=2.0, lambda_rcd=3.0, **loss)
    teacher = frozen_teacher(task)
    missing, complete = (inputs(steps, seed, whole, masked_layers) for seed, whole in ((1, False), (2, True)))
    total, parts = step(model, teacher, missing, complete, targets_of(task))

    expected = losses(model, teacher, samples(missing), samples(complete), LABELS[task], HEADS)
    for name, part in expected.items():
        torch.testing.assert_close(parts[name], part.detach().view(1))
    expected_total = expected["task"] + 0.5 * expected["scd"] + 2.0 * expected["cpd"] + 3.0 * expected["rcd"]
    torch.testing.assert_close(total, expected_total)
    torch.testing.assert_close(parts["loss"], expected_total.detach().view(1))
    names, parameters = zip(*model.named_parameters(), strict=True)
    # Positions are rounded to float32, here and there after different sums.
    for name, parameter, grad in zip(names, parameters, torch.autograd.grad(expected_total, parameters), strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_the_bins_of_a_regression_matter() -> None:
    """So that the cases above tell them apart."""
    student, teacher, targets = draw(1, BATCH, 4), draw(1, BATCH, 4, seed=1), targets_of("regression")
    found = {build("regression", prototypes=b).prototypes(student, teacher, targets).item() for b in (2, 3, 7)}
    assert len(found) == 3


@pytest.mark.parametrize("task", LABELS)
def test_a_network_by_itself_minimises_the_task_loss(task) -> None:
    model = network(task)
    complete = inputs(complete=True)
    loss, parts = model(batch_of(*complete, targets_of(task)))
    assert set(parts) == {"loss", "task"}
    taught = model.represent(inputs_of(*complete))
    torch.testing.assert_close(loss, model.task.loss(taught.logits, targets_of(task)).sum())
    torch.testing.assert_close(parts["task"], loss.detach().view(1))


@pytest.mark.parametrize("task", TASKS)
def test_ablated_losses_are_left_out_with_their_parameters(task) -> None:
    """What is left has a gradient everywhere."""
    teacher, missing, complete = frozen_teacher(task), inputs(), inputs(seed=2, complete=True)
    for scd, cpd, rcd, kind in itertools.product((0.0, 1.0), (0.0, 1.0), (0.0, 1.0), ("mutual-information", "kl")):
        model = build(task, layers=1, lambda_scd=scd, lambda_cpd=cpd, lambda_rcd=rcd, rcd=kind)
        loss, parts = step(model, teacher, missing, complete, targets_of(task))
        kept = {name for name, weight in (("scd", scd), ("cpd", cpd), ("rcd", rcd)) if weight}
        assert set(parts) == {"loss", "task"} | kept
        torch.testing.assert_close(loss.view(1), sum(part for key, part in parts.items() if key != "loss"))
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        has_statistics = any("statistics" in name for name, _ in model.named_parameters())
        assert has_statistics == bool(rcd and kind == "mutual-information")


@pytest.mark.parametrize("data", ["mosi", "mosei", "iemocap", "ict_mmmo"])
@pytest.mark.parametrize("row", METHOD.ablations)
def test_every_row_of_the_shipped_configs_trains_all_it_has(row, data) -> None:
    small = ["model.width=8", "model.heads=2", "model.encoder_layers=1", "loss.statistics_width=4"]
    config = load_config(f"configs/corrkd_{data}.json", [*METHOD.ablations[row], *small])
    features, masks = inputs()
    batch = [x.float() for x in features], masks, targets_of(config.train.task)
    if config.teacher is None:
        model = network_of(config, DIMS, seed=0)
        loss, _ = model(batch_of(*batch))
    else:
        model = student_of(config, DIMS, seed=0)
        with torch.no_grad():
            taught = network_of(config, DIMS, seed=1).represent(inputs_of(*batch[:2]))
        loss, _ = model(batch_of(*batch, taught))
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("task", LABELS)
def test_everything_missing_is_finite(task) -> None:
    """A whole batch of it; its joint representation is 0."""
    features, masks = inputs()
    nothing = [torch.zeros_like(x) for x in features], [torch.zeros_like(m) for m in masks]
    model = build(task)
    loss, _ = step(model, frozen_teacher(task), nothing, inputs(complete=True), targets_of(task))
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    logits, joint = model.network.predict(inputs_of(*nothing))
    assert torch.isfinite(logits).all()
    assert (joint == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_representation_of_zero_has_a_finite_contrastive_gradient(dtype) -> None:
    """That of a sample that misses everything, in the precisions that are trained in."""
    student = draw(1, 3, 8).to(dtype)
    student[0, -1] = 0
    student.requires_grad_()
    build().contrastive(student, draw(1, 3, 8, seed=1).to(dtype)).sum().backward()
    assert torch.isfinite(student.grad).all()


def test_a_prediction_depends_on_its_own_sample_alone() -> None:
    """Neither on its neighbours in the batch, nor on how many there are."""
    model = network()
    features, masks = inputs()
    whole, joint = model.predict(inputs_of(features, masks))
    for i in range(BATCH):
        alone = model.predict(inputs_of([x[:, i : i + 1] for x in features], [m[:, i : i + 1] for m in masks]))
        torch.testing.assert_close(alone[0][:, 0], whole[:, i])
        torch.testing.assert_close(alone[1][:, 0], joint[:, i])


def labelled_by_their_last_frame(seed: int, samples: int = 256) -> Split:
    """Noise of 2 to 12 frames; the label is what language has in the last one."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(2, 13, samples)
    features = {m: rng.normal(size=(frames.sum(), 2)).astype(np.float32) for m in MODALITIES}
    labels = features["language"][frames.cumsum() - 1, 0]
    lengths, present = np.repeat(frames[:, None], 3, 1).astype(np.int32), np.ones((samples, 3), dtype=bool)
    return Split(features, lengths, present, labels, [str(i) for i in range(samples)])


def test_positions_from_the_last_frame_find_what_its_label_depends_on() -> None:
    """H is a mean over frames: which one is the last, positions from the first do not say (accuracy 0.72 and 0.88)."""
    normalisation = {m: (np.zeros(2), np.ones(2)) for m in MODALITIES}

    def accuracy(positions: str, seed: int) -> float:
        raw = small_config_of("corrkd", "none.h5", 32, layers=2)
        raw["model"]["positions"], raw["train"]["task"] = positions, "classification-2"
        config = parse_config(raw)
        train, test = (
            ResidentSplit(labelled_by_their_last_frame(of), normalisation, config, torch.device("cpu"), torch.float32)
            for of in (0, 1)
        )
        network, generator = network_of(config, (2, 2, 2), seed=seed), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
        for _ in range(150):
            rows = torch.randperm(train.size, generator=generator)[None, :32]
            optimizer.zero_grad()
            logits, _ = network.predict(train.complete(rows))
            config.task.loss(logits, train.targets[rows]).sum().backward()
            optimizer.step()
        with torch.no_grad():
            logits, _ = network.predict(test.complete(torch.arange(test.size)[None]))
        return (logits[0].argmax(-1) == test.targets.flatten()).float().mean().item()

    first, last = (np.mean([accuracy(positions, seed) for seed in (1, 2, 3)]) for positions in ("first", "last"))
    assert last > first + 0.08


@pytest.mark.parametrize("steps", [(6, 6, 6), (4, 7, 5)])
@pytest.mark.parametrize("task", ["regression", "classification-3", "emotions-binary"])
def test_models_in_one_process_equal_models_alone(task, steps) -> None:
    """S = 2 with stacked parameters, and two teachers, gives each model's loss and gradient."""
    singles, teachers = [build(task, s) for s in (0, 1)], [frozen_teacher(task, s) for s in (7, 8)]
    together, teachers_together = build(task, 2, models=2), network(task, 9, models=2)
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
    assert all(x.grad_fn is None and not x.requires_grad for x in taught)
    loss, _ = step(model, teacher, inputs(), complete, targets_of("classification-3"))
    torch.optim.SGD([*model.parameters(), *teacher.parameters()], lr=0.1).step()
    assert loss > 0
    for name, parameter in teacher.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("task", ["regression", "classification-3", "emotions-binary"])
def test_a_student_that_is_its_teacher(task) -> None:
    """On the same samples the positive part of SCD, CPD and the divergence are 0, and so are their gradients."""
    model = build(task, rcd="kl", eta=1e-6)  # no two samples are that close
    joint, logits = (x.detach().requires_grad_() for x in model.network.represent(inputs_of(*inputs(complete=True))))
    targets = targets_of(task)
    parts = (
        model.contrastive(joint, joint.detach()),
        model.prototypes(joint, joint.detach(), targets),
        model.responses(logits, logits.detach(), targets),
    )
    assert [part.item() for part in parts] == [0.0, 0.0, 0.0]
    sum(parts).backward()
    torch.testing.assert_close(joint.grad, torch.zeros_like(joint))
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits))


def test_unit_vectors_by_hand() -> None:
    """Rows (3, 4) and 0 of the student against (1, 0) and (0, 2) of the teacher; 0 stays 0 and gets no gradient."""
    student = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    loss = build(eta=1.2).contrastive(student, teacher)
    own = (0.4**2 + 0.8**2) + 1.0
    others = (1.2 - math.hypot(0.6, 0.2)) ** 2 + (1.2 - 1.0) ** 2
    assert loss.item() == pytest.approx((own + others) / 2, rel=1e-12)
    loss.sum().backward()
    assert student.grad[0, 1].tolist() == [0.0, 0.0]
    assert student.grad[0, 0].abs().max() > 0
    assert (student.grad[0, 0] @ student[0, 0]).item() == pytest.approx(0.0, abs=1e-12)  # length does not matter


def test_the_hinge_is_dead_on_raw_representations_and_alive_on_unit_vectors() -> None:
    """Of length 10, as they come out of the encoders, no two representations are within eta of each other."""
    student, teacher = 10 * unit_length(draw(1, 8, 120)), 10 * unit_length(draw(1, 8, 120, seed=1))
    near, far = (
        build(normalise=normalise, eta=1.2).contrastive(student, teacher)
        - build(normalise=normalise, eta=1e-9).contrastive(student, teacher)
        for normalise in (True, False)
    )
    assert far.item() == 0.0
    assert near.item() == 0.0  # independent directions are further apart than eta, too
    similar = 10 * unit_length(teacher + 10 * unit_length(draw(1, 1, 120, seed=2)))  # pairs share half of what they are
    near, far = (
        build(normalise=normalise, eta=1.2).contrastive(similar, similar)
        - build(normalise=normalise, eta=1e-9).contrastive(similar, similar)
        for normalise in (True, False)
    )
    assert far.item() == 0.0
    assert near.item() > 0.01


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalise", [True, False])
def test_gradient_of_the_contrastive_loss(reduction, normalise) -> None:
    """Away from D = eta, with distances on both sides of it."""
    student, teacher = 0.4 * draw(2, 4, 6), 0.4 * draw(2, 4, 6, seed=1)
    eta = 1.2
    compared = [unit_length(x) if normalise else x for x in (student, teacher)]
    across = torch.cdist(*compared)[:, ~torch.eye(4, dtype=torch.bool)]
    assert (across - eta).abs().min() > 1e-3
    assert (across < eta).any()
    assert (across > eta).any()
    model = build(eta=eta, reduction=reduction, normalise=normalise)
    assert torch.autograd.gradcheck(lambda x: model.contrastive(x, teacher), student.requires_grad_())


@pytest.mark.parametrize("task", LABELS)
def test_gradient_of_the_prototypes(task) -> None:
    model, teacher = build(task, prototypes=7), draw(1, BATCH, 6, seed=1)
    student = draw(1, BATCH, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model.prototypes(x, teacher, targets_of(task)), student)


@pytest.mark.parametrize("task", LABELS)
@pytest.mark.parametrize("rcd", ["mutual-information", "kl"])
def test_gradient_of_the_responses(task, rcd) -> None:
    model, teacher = build(task, rcd=rcd), draw(1, BATCH, Task(task).outputs, seed=1)
    student = draw(1, BATCH, Task(task).outputs).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model.responses(x, teacher, targets_of(task)), student)


def test_responses_of_three_classes_are_split_by_hand() -> None:
    model = build("classification-3")
    logits = torch.tensor([[[0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [0.7, 0.1, 0.2]]], dtype=torch.float64).log() + 2.0
    target, others = model.disentangle(logits, torch.tensor([[[1], [2], [0]]]))
    torch.testing.assert_close(target, torch.tensor([[[0.3], [0.1], [0.7]]], dtype=torch.float64))
    torch.testing.assert_close(others, torch.tensor([[[0.2, 0.5], [0.6, 0.3], [0.1, 0.2]]], dtype=torch.float64))


def test_responses_of_several_emotions_are_split_by_hand() -> None:
    """Groups are the emotions of the first model, then those of the second."""
    holds = torch.tensor([[[0.9, 0.8, 0.7, 0.6]], [[0.4, 0.3, 0.2, 0.1]]], dtype=torch.float64)  # [S, N, P]
    logits = torch.stack((1 - holds, holds), dim=-1).log().flatten(2)
    classes = torch.tensor([[[1, 0, 0, 1]], [[0, 1, 1, 0]]])
    target, others = build("emotions-binary").disentangle(logits, classes)
    expected = torch.tensor([0.9, 0.2, 0.3, 0.6, 0.6, 0.3, 0.2, 0.9], dtype=torch.float64).view(8, 1, 1)
    torch.testing.assert_close(target, expected)
    torch.testing.assert_close(others, 1 - expected)


def test_two_responses_by_hand() -> None:
    """F of the targets is `Rt + Rs`, F of the others is 0, whose bound is `-2 ln 2`."""
    model = build("classification-2")
    with torch.no_grad():
        for parameter in (*model.target_statistics.parameters(), *model.other_statistics.parameters()):
            parameter.zero_()
        model.target_statistics.weight_q[..., 0] = model.target_statistics.weight_u[..., 0] = 1.0
        model.target_statistics.weight[..., 0] = 1.0
    teacher = torch.tensor([[[0.2, 0.8], [0.6, 0.4]]], dtype=torch.float64).log()
    student = torch.tensor([[[0.3, 0.7], [0.5, 0.5]]], dtype=torch.float64).log()
    found = model.responses(student, teacher, torch.tensor([[[1], [0]]]))

    def softplus(x):
        return math.log1p(math.exp(x))

    joint = -(softplus(-(0.8 + 0.7)) + softplus(-(0.6 + 0.5))) / 2
    marginal = (softplus(0.8 + 0.5) + softplus(0.6 + 0.7)) / 2
    assert found.item() == pytest.approx(-(joint - marginal) + 2 * math.log(2), rel=1e-12)


@pytest.mark.parametrize("loss", [{}, {"reduction": "sum"}], ids=str)
@pytest.mark.parametrize("task", ["regression", "classification-3", "emotions-binary"])
def test_losses_do_not_depend_on_the_number_of_processes(task, loss, in_two_processes) -> None:
    """Averaged over two processes of 3 samples, losses and gradients are those of one process with 6."""
    model = build(task, **loss)
    statistics = [p for name, p in model.named_parameters() if "statistics" in name]
    outputs = model.task.outputs
    student = 0.3 * draw(1, 6, 3 * WIDTH), draw(1, 6, outputs)
    taught = Representation(0.3 * draw(1, 6, 3 * WIDTH, seed=1), draw(1, 6, outputs, seed=1))
    targets = torch.tensor([LABELS[task] + LABELS[task][::-1]])

    def distillation(rows):
        joint, logits = (x[:, rows].clone().requires_grad_() for x in student)
        scd = model.contrastive(joint, taught.joint[:, rows])
        cpd = model.prototypes(joint, taught.joint[:, rows], targets[:, rows])
        rcd = model.responses(logits, taught.logits[:, rows], targets[:, rows])
        grads = torch.autograd.grad((scd + cpd + rcd).sum(), [joint, logits, *statistics])
        return torch.cat((scd, cpd, rcd)).detach(), grads[:2], grads[2:]

    parts, (of_joint, of_logits), of_statistics = distillation(slice(None))
    first, second = in_two_processes(lambda rank: distillation(slice(3 * rank, 3 * rank + 3)))
    torch.testing.assert_close((first[0] + second[0]) / 2, parts)
    torch.testing.assert_close(torch.cat((first[1][0], second[1][0]), 1) / 2, of_joint)
    torch.testing.assert_close(torch.cat((first[1][1], second[1][1]), 1) / 2, of_logits)
    for a, b, expected in zip(first[2], second[2], of_statistics, strict=True):
        torch.testing.assert_close((a + b) / 2, expected)
