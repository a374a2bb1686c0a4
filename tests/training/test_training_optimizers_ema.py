"""The average of the weights: by hand, put in and taken out again, saved by name."""

from __future__ import annotations

import pytest
import torch

from sihe.core.errors import ConfigError, InvalidInput
from sihe.training.optimizers import WeightAverage


def averaged(average: WeightAverage) -> torch.Tensor:
    return average.state_tensors()["average.w"].clone()


def test_averages_by_hand() -> None:
    weight = torch.tensor([1.0, 2.0])
    average = WeightAverage({"w": weight}, 0.9, warms_up=False)
    weight += 1
    average.update()
    weight += 1
    average.update()
    expected = 0.9 * (0.9 * torch.tensor([1.0, 2.0]) + 0.1 * torch.tensor([2.0, 3.0])) + 0.1 * torch.tensor([3.0, 4.0])
    torch.testing.assert_close(averaged(average), expected)


def test_the_first_weights_are_soon_forgotten() -> None:
    weight = torch.ones(1)
    average = WeightAverage({"w": weight}, 0.999)
    weight.zero_()
    average.update()
    torch.testing.assert_close(averaged(average), torch.tensor([2 / 11]))


def test_applied_weights_are_put_back_whatever_happens() -> None:
    model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    average = WeightAverage(dict(model.named_parameters()), 0.5, warms_up=False)
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    before = model.weight.detach().clone()
    with pytest.raises(KeyError), average.applied():
        assert torch.equal(model.weight, first)
        raise KeyError
    assert torch.equal(model.weight, before)


def test_states_come_back_by_name() -> None:
    weight = torch.randn(4, generator=torch.Generator().manual_seed(0))
    straight, other = weight.clone(), weight.clone()
    average = WeightAverage({"w": straight}, 0.9)
    straight += 1
    average.update()
    resumed = WeightAverage({"w": other}, 0.9)
    resumed.load_state_tensors({name: tensor.clone() for name, tensor in average.state_tensors().items()})
    for each, tensor in ((average, straight), (resumed, other)):
        tensor.fill_(2.0)
        each.update()
    assert torch.equal(averaged(average), averaged(resumed))


@pytest.mark.parametrize("wrong", [{"v": torch.zeros(4)}, {"w": torch.zeros(5)}, {}])
def test_another_models_average_is_refused(wrong: dict[str, torch.Tensor]) -> None:
    average = WeightAverage({"w": torch.ones(4)}, 0.9)
    with pytest.raises(InvalidInput, match="another model"):
        average.load_state_tensors(WeightAverage(wrong, 0.9).state_tensors())
    assert torch.equal(averaged(average), torch.ones(4))


def test_a_decay_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"\[0, 1\)"):
        WeightAverage({}, 1.0)
