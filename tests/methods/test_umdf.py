"""UMDF against its literal twin, its losses, its ablations, unaligned input, and several models at once."""

from __future__ import annotations

import pytest
import torch
from literal_umdf import joint_representation, predict

from fastmmkd.data.batches import by_layer
from fastmmkd.methods.umdf import UMDF, UmdfLoss, UmdfModel
from fastmmkd.ops import gaussian_mmd, js_divergence
from fastmmkd.ops.philox import DrawKeys
from fastmmkd.tasks import Task
from tests.handmade import batch_of, inputs_of

DIMS, HEADS, BATCH = (5, 4, 3), 2, 3


def build(task="regression", loss=None, seed=0, models=1, **model) -> UMDF:
    torch.manual_seed(seed)
    block = UmdfModel(**{"width": 8, "heads": HEADS, "mcim_layers": 2, "encoder_layers": 2} | model)
    return UMDF(block, loss or UmdfLoss(), Task(task), DIMS, models).double()


def inputs(steps=(6, 6, 6), batch=BATCH, seed=1, masked_layers="all"):
    """Two versions of a batch; one sample of the second misses everything. The first frame of each is padding."""
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(1, 2 * batch, t, generator=generator) < 0.6 for t in steps]
    for mask in masks:
        mask[0, -1] = False
        mask[..., 0] = False
    features = [
        torch.randn(1, 2 * batch, t, d, generator=generator, dtype=torch.float64) * mask.unsqueeze(-1)
        for t, d, mask in zip(steps, DIMS, masks, strict=True)
    ]
    if masked_layers == "first":
        masks += [(torch.arange(t) > 0).expand_as(mask) for t, mask in zip(steps, masks, strict=True)]
    return features, masks


@pytest.mark.parametrize("model", [{}, {"mcim": False}, {"dfim": False}])
@pytest.mark.parametrize("task", ["regression", "classification-3", "emotions-binary"])
@pytest.mark.parametrize("masked_layers", ["all", "first"])
def test_losses_equal_the_literal_twin(model, task, masked_layers) -> None:
    umdf = build(task, UmdfLoss(lambda_fea=0.5, lambda_logits=2.0), **model)
    features, masks = inputs(masked_layers=masked_layers)
    problems = umdf.task.problems
    labels = torch.tensor([0.4, -1.2, 2.0], dtype=torch.float64)
    targets = labels[None] if task == "regression" else torch.tensor([[[0] * problems, [1] * problems, [0] * problems]])
    loss, parts = umdf(batch_of(features, masks, targets))

    h = [
        joint_representation(umdf, [x[0, i] for x in features], [m[0, i] for m in masks], HEADS)
        for i in range(2 * BATCH)
    ]
    usable = [masks[-3][0, i] | masks[-2][0, i] | masks[-1][0, i] for i in range(2 * BATCH)]
    logits = torch.stack([predict(umdf, h[i], h[i + BATCH], usable[i], usable[i + BATCH], HEADS) for i in range(BATCH)])
    last = torch.stack([x[-1] for x in h])
    f_y = last @ umdf.f_y.weight[0] + umdf.f_y.bias[0]
    a, b = f_y[:BATCH], f_y[BATCH:]
    if task == "regression":
        expected = ((logits[:, 0] - labels) ** 2).mean()
        consistency = ((a - b) ** 2).mean()
    else:
        split = logits.view(BATCH, problems, -1)
        expected = -sum(torch.log_softmax(split[i, p], -1)[targets[0, i, p]] for i in range(3) for p in range(problems))
        expected = expected / (BATCH * problems)
        consistency = (
            sum(
                js_divergence(a.view(BATCH, problems, -1)[None, :, p], b.view(BATCH, problems, -1)[None, :, p])
                for p in range(problems)
            )
            / problems
        )
    fea = gaussian_mmd(last[None, :BATCH], last[None, BATCH:])
    torch.testing.assert_close(parts["task"], expected.view(1))
    torch.testing.assert_close(parts["fea"], fea)
    torch.testing.assert_close(parts["logits"], consistency.view(1))
    total = parts["task"] + 0.5 * parts["fea"] + 2.0 * parts["logits"]
    torch.testing.assert_close(loss.view(1), total)


@pytest.mark.parametrize("masked_layers", ["all", "first"])
def test_what_a_layer_puts_into_missing_frames_is_used(masked_layers) -> None:
    """With V missing, the third layer's L and A depend on V's stream out of the first layer, or do not at all."""
    umdf = build(mcim_layers=3)
    features, masks = inputs(masked_layers=masked_layers)
    features[2], masks[2] = torch.zeros_like(features[2]), torch.zeros_like(masks[2])
    rows = inputs_of(features, masks)
    first, later = by_layer(rows.masks)
    streams = umdf.mcim[0](umdf.embedding(rows.features, rows.layouts), first, rows.layouts)
    visual = streams[2].detach().requires_grad_()
    streams = [*streams[:2], visual]
    for layer in umdf.mcim[1:]:
        streams = layer(streams, later, rows.layouts)
    outputs = streams[0].relu().sum() + streams[1].relu().sum()  # a norm's plain sum would not depend on anything
    used = torch.autograd.grad(outputs, visual)[0].abs().max().item()
    assert used > 1e-3 if masked_layers == "first" else used == 0.0


def test_only_the_first_layer_masks_missing_frames() -> None:
    """The first layer is given the first masks; later layers, the encoder after MCIM and DFIM the later ones."""
    umdf = build(mcim_layers=3)
    features, masks = inputs(masked_layers="first")
    seen: list[tuple[torch.Tensor, ...]] = []
    for layer in umdf.mcim:
        layer.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[1])))
    for encoder in (umdf.encoder, umdf.dfim.encoder):
        encoder.register_forward_pre_hook(lambda _, given: seen.append(given[1:3]))
    batch = batch_of(features, masks, torch.zeros(1, BATCH))
    umdf(batch)
    expected_first, expected_later = by_layer(batch.inputs.masks)
    first, second, third, after, integrated = seen
    assert all(torch.equal(a, b) for a, b in zip(first, expected_first, strict=True))
    for later in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(later, expected_later, strict=True))
    assert all(torch.equal(mask, expected_later[0]) for mask in after)
    assert all(torch.equal(mask, expected_later[0].chunk(2, 1)[0]) for mask in integrated)


@pytest.mark.parametrize("model", [{}, {"mcim": False}, {"dropout": 0.3}])
def test_unaligned_path_equals_the_aligned_one(model) -> None:
    """Masked frames in front of a stream lengthen it but change nothing else."""
    umdf = build(**model)
    features, masks = inputs()
    draw = DrawKeys(torch.tensor([[7, 2, 9]]), torch.tensor([3]), torch.tensor(0))
    longer = [0, 3, 1]
    rows = inputs_of(features, masks)
    z = umdf.embedding(rows.features, rows.layouts, draw)
    padded = [
        torch.cat((torch.randn(1, 2 * BATCH, n, 8, dtype=torch.float64), x.unflatten(1, (2 * BATCH, -1))), 2)
        for x, n in zip(z, longer, strict=True)
    ]
    padded_masks = [
        torch.cat((torch.zeros(1, 2 * BATCH, n, dtype=torch.bool), m), 2) for m, n in zip(masks, longer, strict=True)
    ]
    unaligned_rows = inputs_of(padded, padded_masks)
    aligned, unaligned = (
        umdf.mcim[0](streams, of.masks, of.layouts, draw)
        for streams, of in ((z, rows), (unaligned_rows[0], unaligned_rows))
    )
    for a, u, n in zip(aligned, unaligned, longer, strict=True):
        torch.testing.assert_close(u.unflatten(1, (2 * BATCH, -1))[:, :, n:], a.unflatten(1, (2 * BATCH, -1)))


@pytest.mark.parametrize("masked_layers", ["all", "first"])
def test_trains_on_unaligned_input_and_with_everything_missing(masked_layers) -> None:
    umdf = build()
    features, masks = inputs(steps=(5, 11, 8), masked_layers=masked_layers)
    loss, _ = umdf(batch_of(features, masks, torch.zeros(1, BATCH)))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in umdf.parameters())
    nothing = [torch.zeros_like(x) for x in features], [torch.zeros_like(m) for m in masks[:3]] + masks[3:]
    logits, representation = umdf.predict(inputs_of(*nothing))
    assert torch.isfinite(logits).all()
    assert torch.isfinite(representation).all()


def test_ablated_losses_are_left_out() -> None:
    features, masks = inputs()
    targets = torch.zeros(1, BATCH)
    for name, loss in (("fea", UmdfLoss(lambda_fea=0.0)), ("logits", UmdfLoss(lambda_logits=0.0))):
        total, parts = build(loss=loss)(batch_of(features, masks, targets))
        assert name not in parts
        others = sum(part for key, part in parts.items() if key != "loss")
        torch.testing.assert_close(total.view(1), others)


def test_inference_clones_the_sample() -> None:
    """`predict` equals the training path with the sample as both versions."""
    umdf = build()
    features, masks = inputs()
    logits, _ = umdf.predict(inputs_of(features, masks))
    twice = [torch.cat((x, x), 1) for x in features], [torch.cat((m, m), 1) for m in masks]
    both, one = inputs_of(*twice), inputs_of(features, masks)
    integrated, _ = umdf.integrate(*umdf.encode(both), both.layouts[0], one.layouts[0])
    torch.testing.assert_close(integrated, logits)


def test_a_prediction_depends_on_its_own_sample_alone() -> None:
    """Neither on its neighbours in the batch, nor on how many there are."""
    umdf = build()
    features, masks = inputs()
    whole, _ = umdf.predict(inputs_of(features, masks))
    for i in range(2 * BATCH):
        alone, _ = umdf.predict(inputs_of([x[:, i : i + 1] for x in features], [m[:, i : i + 1] for m in masks]))
        torch.testing.assert_close(alone[:, 0], whole[:, i])


@pytest.mark.parametrize("masked_layers", ["all", "first"])
@pytest.mark.parametrize("steps", [(6, 6, 6), (4, 7, 5)])
def test_models_in_one_process_equal_models_alone(steps, masked_layers) -> None:
    """S = 2 with stacked parameters gives each model's loss and gradient."""
    singles = [build("classification-2", seed=s) for s in (0, 1)]
    together = build("classification-2", seed=2, models=2)
    with torch.no_grad():
        for name, parameter in together.named_parameters():
            parameter.copy_(torch.cat([dict(m.named_parameters())[name] for m in singles]))
    data = [inputs(steps, seed=s, masked_layers=masked_layers) for s in (3, 4)]
    features, masks = ([torch.cat(pair) for pair in zip(*part, strict=True)] for part in zip(*data, strict=True))
    targets = torch.tensor([[[0], [1], [1]], [[1], [1], [0]]])
    total, parts = together(batch_of(features, masks, targets))
    total.backward()
    for s, model in enumerate(singles):
        loss, alone = model(batch_of(*data[s], targets[s : s + 1]))
        loss.backward()
        for name, part in alone.items():
            torch.testing.assert_close(parts[name][s : s + 1], part)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(dict(together.named_parameters())[name].grad[s : s + 1], parameter.grad)
