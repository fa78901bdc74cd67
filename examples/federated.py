"""Average the models of five clients: BatchNorm, GroupNorm, and anchored Switchable Normalization.

The network is trained with BatchNorm on public digits; the clients' are mirrored. Either each client has two of the
classes, or each has a camera of its own, with another contrast. Takes half a minute: ``python examples/federated.py``
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F

import normswap
from normswap.demo.digits import digits
from normswap.demo.torch import trained

ROUNDS, LOCAL_STEPS, BATCH, RATE = 20, 10, 16, 0.02
CONTRASTS = torch.tensor([0.3, 0.6, 1.0, 1.5, 3.0])


def local(model, images, labels, seed):
    """Return the state of a client's copy of the model after its steps."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for chosen in np.random.default_rng(seed).integers(0, len(images), (LOCAL_STEPS, BATCH)):
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model.state_dict()


def federated(model, images, labels, owners, rounds):
    """Run FedAvg, which averages weights, and BatchNorm's running statistics with them."""
    for turn in range(rounds):
        clients = [owners == number for number in range(5)]
        states = [local(model, images[own], labels[own], [turn, number]) for number, own in enumerate(clients)]
        shares = [float(own.float().mean()) for own in clients]
        for name, value in model.state_dict().items():
            value.copy_(sum(share * state[name] for share, state in zip(shares, states, strict=True)))
    return model.eval()


def main(skew, rounds=ROUNDS):
    """Return for each network the accuracy on all clients' images, before and after."""
    own, public = digits("channels_first")
    original = trained(public)
    images, labels = map(torch.from_numpy, own.batch(range(len(own))))
    owners = labels // 2 if skew == "classes" else torch.arange(len(labels)) % 5
    images = images.flip(-1) * (1 if skew == "classes" else CONTRASTS[owners, None, None, None])
    learn, test = slice(1000), slice(1000, None)
    networks = {
        "BatchNorm": copy.deepcopy(original),
        "GroupNorm": normswap.patch(original, "gn", example=images[:2], inplace=False).model,
        "anchored SN": normswap.patch(original, normswap.SwitchNorm(batch_statistics="frozen"), inplace=False).model,
    }

    @torch.no_grad()
    def top1(model):
        return 100 * float((model(images[test]).argmax(1) == labels[test]).float().mean())

    return {
        name: (top1(model), top1(federated(model, images[learn], labels[learn], owners[learn], rounds)))
        for name, model in networks.items()
    }


if __name__ == "__main__":
    for skew in ("classes", "cameras"):
        print(f"clients have their own {skew}")
        for name, (before, after) in main(skew).items():
            print(f"  {name:12}{before:6.1f} % -> {after:.1f} %")
