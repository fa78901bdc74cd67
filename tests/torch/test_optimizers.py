"""The optimizers of a PyTorch training, by their formulas."""

import pytest
import torch
from torch import nn

import normswap
from normswap.finetune.run.torch.optimizer import optimizer_of
from normswap.finetune.run.torch.train import train

from ..rules import RULES, agree, trained, training
from .runs import coloured


@pytest.mark.parametrize("options", RULES, ids=str)
@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_formulas(options, schedule):
    """A linear network comes to what the rule's formula says, its bias spared by weight decay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 3))
    data, how = coloured(), training(schedule=schedule, **options)
    images, labels = data.batch(range(len(data)))
    layer = model[1]
    start = layer.weight.detach().numpy().T, layer.bias.detach().numpy()
    weight, bias = trained(images.reshape(len(images), -1), labels, *start, how)
    train(model, data, how)

    assert agree(layer.weight.detach().numpy().T, weight)
    assert agree(layer.bias.detach().numpy(), bias)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "amsgrad"])
def test_groups(model, optimizer):
    """Every rule spares norms, biases and gates its weight decay, and gives gates their multiple of the rate."""
    normswap.patch(model, "sn")
    found = optimizer_of(model, training(optimizer=optimizer, weight_decay=0.1, gate_lr=10.0))
    by = {id(p): (g["weight_decay"], g["lr"]) for g in found.param_groups for p in g["params"]}

    assert by == {
        id(parameter): (
            0.1 if parameter.dim() > 1 else 0.0,
            0.5 if name.endswith(("mean_weight", "var_weight")) else 0.05,
        )
        for name, parameter in model.named_parameters()
    }
