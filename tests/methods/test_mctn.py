"""MCTN against its literal twin; what a prediction from one modality depends on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from whole_batches import (
    BATCH,
    Sample,
    assert_same_gradients,
    config_of,
    drawn,
    has,
    linear,
    literal_error,
    objective_of,
    samples,
    split_of,
    targets_of,
)

from fastmmkd.methods.mctn import Chain, Decoder
from tests.literal_recurrence import literal, literal_states

Frames = list[torch.Tensor]


def attended(frames: Frames, scores: Frames, counts: list[bool]) -> torch.Tensor:
    """The frames that count, weighted by the softmax of their scores; 0 where none does."""
    weights = [score.exp() if c else score.new_zeros(()) for score, c in zip(scores, counts, strict=True)]
    total = sum(weights)
    return (
        sum(w / total * x for w, x in zip(weights, frames, strict=True)) if any(counts) else torch.zeros_like(frames[0])
    )


def both(net: Any, frames: Frames, counts: list[bool]) -> Frames:
    outputs, _ = literal(net, torch.stack(frames), torch.tensor(counts))
    return list(outputs[0] + outputs[1])


def hard(x: torch.Tensor) -> torch.Tensor:
    return (0.2 * x + 0.5).clamp(0, 1)


def decoded(decoder: Decoder, encoded: Frames, counts: list[bool], into: int) -> Frames:
    """A frame for each of the source's, as the code does it: the score has a part of the last cell state."""
    outputs, d = [], len(encoded[0])
    h = c = torch.zeros(d, dtype=torch.float64)
    of_cell = torch.linspace(-2, 2, d, dtype=torch.float64)  # w of the cell state: it makes no difference
    states = []
    for _ in encoded:
        context = attended(encoded, [x @ decoder.score[0, :, 0] + of_cell @ c.detach() for x in encoded], counts)
        if decoder.literal:
            z = context @ decoder.core.input.weight[0] + decoder.core.input.bias[0] + h @ decoder.core.recurrent[0]
            gate, candidate, out = z.split(d)
            c = hard(gate) * c + hard(gate) * candidate.tanh()
            h = hard(out) * c.tanh()
            outputs.append(linear(decoder.readouts[into], h).tanh())
        else:
            states.append(context)
    if not decoder.literal:
        alone = decoder.core.layers[0][0].module
        outputs = [linear(decoder.readouts[into], h) for h in literal_states(alone, states)]
    return outputs


def pooled(sample: Sample, modality: int, frames: int) -> list[torch.Tensor | None]:
    """A modality's frames that are there, over as many bins; None where a bin has none."""
    x, bins = sample.features[modality], []
    for i in range(frames):
        first, last = i * len(x) // frames, -(-(i + 1) * len(x) // frames)
        own = [x[t] for t in range(first, last) if sample.present[modality][t]]
        bins.append(sum(own) / len(own) if own else None)
    return bins


def encoded(chain: Chain, sample: Sample) -> tuple[Frames, Frames, torch.Tensor]:
    """H, Z and the vector that the head reads."""
    counts = sample.counts[chain.source].tolist()
    h = both(chain.encoder, [linear(chain.adapter, x) for x in sample.features[chain.source]], counts)
    z = both(chain.second_encoder, h, counts) if chain.has_second_level else h
    (r,), (last,) = literal(chain.regressor, torch.stack(z), torch.tensor(counts))
    if chain.readout == "last":
        return h, z, last
    return h, z, attended(list(r), [linear(chain.attention, x)[0].tanh() for x in r], counts)


def literal_loss(objective: Any, batch: Any, config: Any) -> dict[str, torch.Tensor]:
    """Every part, summed over chains; targets pooled, mean over all frames that are there."""
    parts = dict.fromkeys(("task", "forward", "cycle", "second", "ridge"), torch.zeros((), dtype=torch.float64))
    for chain in objective.module.chains:
        task, errors = [], {"forward": [], "cycle": [], "second": []}
        for sample, target in zip(samples(batch.inputs), targets_of(batch), strict=True):
            if not has(sample, chain.source):
                continue
            counts = sample.counts[chain.source].tolist()
            h, z, vector = encoded(chain, sample)
            task.append(literal_error(linear(chain.head, vector), target, config))

            def compare(name: str, frames: Frames, modality: int) -> None:
                for made, wanted in zip(frames, pooled(sample, modality, len(frames)), strict=True):  # noqa: B023
                    if wanted is not None:
                        errors[name].append((made - wanted).square().sum() / len(wanted))  # noqa: B023

            there = decoded(chain.decoder, h, counts, 0)
            compare("forward", there, chain.target)
            if config.loss.lambda_cycle:
                again = both(chain.encoder, [linear(chain.adapter_back, y) for y in there], counts)
                compare("cycle", decoded(chain.decoder, again, counts, 1), chain.source)
            if chain.has_second_level:
                compare("second", decoded(chain.second_decoder, z, counts, 0), chain.last)
        parts["task"] = parts["task"] + sum(task) / max(len(task), 1)
        for name, of_frames in errors.items():
            parts[name] = parts[name] + sum(of_frames) / max(len(of_frames), 1)
        parts["ridge"] = parts["ridge"] + chain.head.weight.square().sum()
    return parts


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all": ({}, {}),
    "literal decoder": ({"literal_decoder": True}, {}),
    "w/o cycle": ({}, {"lambda_cycle": 0.0}),
    "w/o second level": ({"second_level": False}, {}),
    "masked": ({"attention_mask": "missing"}, {}),
    "last frame": ({"readout": "last"}, {}),
    "last frame, masked": ({"readout": "last", "attention_mask": "missing"}, {}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("task", "alignment"), [("regression", "unaligned"), ("emotions-binary", "aligned")])
def test_losses_and_gradients_equal_the_literal_twin(task: str, alignment: str, form: str) -> None:
    model, loss = FORMS[form]
    weights = {"lambda_forward": 0.3, "lambda_cycle": 0.2, "lambda_second": 0.4, "lambda_ridge": 0.05} | loss
    config = config_of("mctn", task, model, **weights)
    objective = objective_of(config, split_of(task, alignment))
    batch = drawn(objective)
    total, parts = objective.loss(batch)
    literal_parts = literal_loss(objective, batch, config)
    for name in parts.keys() - {"loss"}:
        torch.testing.assert_close(
            parts[name][0], literal_parts[name].detach(), msg=lambda text, n=name: f"{n}: {text}"
        )
    left_out = {"cycle"} if form == "w/o cycle" else {"second"} if form == "w/o second level" else set()
    assert set(parts) == {"loss", "task", "forward", "cycle", "second", "ridge"} - left_out
    used = {name: part for name, part in literal_parts.items() if name in parts}
    expected = sum(part * weights.get(f"lambda_{name}", 1.0) for name, part in used.items())
    torch.testing.assert_close(total, expected)
    assert_same_gradients(objective, total, expected)


def test_predictions_are_means_over_the_chains_whose_source_is_there() -> None:
    config = config_of("mctn")
    objective = objective_of(config, split_of())
    batch = drawn(objective)
    logits, joint = objective.module.predict(batch.inputs)
    assert joint.shape == (1, BATCH, 3 * config.model.width)
    numbers = set()
    for b, sample in enumerate(samples(batch.inputs)):
        chains = [c for c in objective.module.chains if has(sample, c.source)] or list(objective.module.chains)
        own = [linear(c.head, encoded(c, sample)[2]) for c in chains]
        torch.testing.assert_close(logits[0, b], sum(own) / len(own))
        numbers.add(sum(has(sample, m) for m in range(3)))
    assert {0, 3} < numbers, "no sample that lacks some, or all"


@torch.no_grad()
def test_what_is_predicted_from_language_does_not_change_when_audio_and_visual_do() -> None:
    """Neither under `{l}`, nor what language's chain makes of samples that have all three."""
    objective = objective_of(config_of("mctn"), split_of())
    inputs = drawn(objective).inputs
    features = [x * (1 if m == 0 else -7) for m, x in enumerate(inputs.features)]
    others, network = inputs._replace(features=features), objective.module
    for of_language in (
        lambda of: network.chains[0](of).vector,
        lambda of: network.predict(of.only((True, False, False))),
    ):
        torch.testing.assert_close(of_language(others), of_language(inputs), rtol=0, atol=0)
    assert not torch.equal(network.predict(others)[0], network.predict(inputs)[0])
