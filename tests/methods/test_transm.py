"""TransM against its literal twin, what its switches leave out, and what its losses do not depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from literal_transm import losses, predict

from fastmmkd.config import parse_config
from fastmmkd.errors import UserError
from fastmmkd.methods.transm import METHOD, TransM
from tests.handmade import small_config_of
from tests.methods.ragged_samples import batch_of_rows, config_of, objective_of, samples

HEADS, ROWS = 2, [0, 1, 2, 5, 9]
"""The longest sample, the shortest, one that lacks everything, and two more."""
CASES: list[dict[str, Any]] = [
    {},
    {"task": "classification-3"},
    {"task": "emotions-binary"},
    {"task": "emotions-binary", "loss": {"task": "project"}},
    {"model": {"backward": False}},
    {"model": {"query": "position", "decoder_layers": 2}},
    {"model": {"readout": "last"}},
    {"model": {"attention_mask": "missing"}},
    {"model": {"attention_mask": "missing", "masked_layers": "first", "decoder_layers": 2}},
    {"loss": {"lambda_translation": 0.0}},
    {"loss": {"lambda_translation": 0.0}, "model": {"backward": False}},
]


@pytest.mark.parametrize("alignment", ["aligned", "unaligned"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients_equal_the_literal_twin(case: dict[str, Any], alignment: str) -> None:
    config = config_of("transm", len(ROWS), **({"loss": {"lambda_translation": 0.5}} | case))
    objective = objective_of(config, alignment)
    batch, network = batch_of_rows(objective, ROWS), objective.module
    assert isinstance(network, TransM)
    total, parts = objective.loss(batch)
    expected = losses(network, samples(batch.inputs), samples(batch.complete, True), batch.targets[0].tolist(), HEADS)
    assert set(parts) == {"loss", *expected}
    for name, part in expected.items():
        torch.testing.assert_close(parts[name], part.detach().view(1))
    whole = expected["task"] + config.loss.lambda_translation * expected.get("translation", 0.0)
    torch.testing.assert_close(total, whole)
    names, parameters = zip(*network.named_parameters(), strict=True)
    made, wanted = (torch.autograd.grad(x, parameters) for x in (total, whole))
    # Positions are rounded to float32.
    torch.testing.assert_close(
        dict(zip(names, made, strict=True)), dict(zip(names, wanted, strict=True)), rtol=1e-5, atol=1e-6
    )
    logits = torch.stack([predict(network, *sample, HEADS) for sample in samples(batch.inputs)])
    torch.testing.assert_close(network.predict(batch.inputs)[0][0], logits)


def test_translations_are_told_what_the_complete_samples_have_and_no_more() -> None:
    """A frame that the version lacks counts, one that the data lack, or that nobody has, does not."""
    objective = objective_of(config_of("transm", len(ROWS)), "unaligned")
    batch, network = batch_of_rows(objective, ROWS), objective.module
    assert isinstance(network, TransM)
    complete = batch.complete
    with torch.no_grad():
        for readout in (*network.readouts, *network.back_readouts):
            readout.weight.zero_()
            readout.bias.fill_(0.25)
    for x, there, kept in zip(complete.features, complete.present, batch.inputs.present, strict=True):
        assert not there.all()
        x[there] = 1.25
        assert (there & ~kept).any()
        x[there & ~kept] = 2.25
    wanted = 0.0
    for target in (1, 0, 2, 0):
        there, kept = complete.present[target], batch.inputs.present[target]
        wanted += 1 + ((there & ~kept).sum() / there.sum()).item()
    assert network.losses(batch).parts["translation"].item() == pytest.approx(wanted)


def test_hidden_targets_cannot_be_copied() -> None:
    """With queries of positions, what language is translated into says nothing of the target; else it does."""
    for query, copies in (("input", True), ("position", False)):
        objective = objective_of(config_of("transm", len(ROWS), model={"query": query}), "aligned")
        network, inputs = objective.module, batch_of_rows(objective, ROWS).complete
        assert isinstance(network, TransM)
        made = []
        for shift in (0, 1):
            streams = network.embedding([*inputs.features[:2], inputs.features[2] + shift], inputs.layouts)
            made.append(network._cells(streams, inputs)[1].translated)
        assert torch.equal(*made) != copies


def test_what_is_left_out_has_no_parameters() -> None:
    def parts(row: str) -> set[str]:
        raw = small_config_of("transm", "none.h5", 8)
        for key, value in (override.split("=") for override in METHOD.ablations[row]):
            block, last = key.split(".")
            raw[block][last] = {"false": False, "0.0": 0.0}[value]
        return {name.split(".")[0] for name, _ in METHOD.network(parse_config(raw), (5, 4, 3)).named_parameters()}

    whole = {"embedding", "encoder", "decoder", "back_encoder", "back_decoder", "readouts", "back_readouts", "head"}
    assert parts("TransM") == whole
    assert parts("w/o backward translation") == whole - {"back_encoder", "back_decoder", "back_readouts"}
    assert parts("w/o translation losses") == whole - {"back_decoder", "readouts", "back_readouts"}


def test_losses_do_not_depend_on_the_number_of_processes(in_two_processes: Any) -> None:
    objective = objective_of(config_of("transm", 6), "unaligned")
    rows, network = [0, 1, 2, 5, 9, 11], objective.module
    parameters = list(network.parameters())

    def step(rows: list[int]) -> tuple[torch.Tensor, ...]:
        total, parts = network(batch_of_rows(objective, rows))
        return torch.stack(list(parts.values())), *torch.autograd.grad(total, parameters)

    whole = step(rows)
    first, second = in_two_processes(lambda rank: step(rows[3 * rank : 3 * rank + 3]))
    torch.testing.assert_close([(a + b) / 2 for a, b in zip(first, second, strict=True)], list(whole))


def test_there_is_no_teacher() -> None:
    with pytest.raises(UserError, match=r"^config: teacher: expected"):
        parse_config(small_config_of("transm", "none.h5", 8) | {"teacher": {"epochs": 2}})
