"""Train a detector with two images at a time: BatchNorm, frozen BatchNorm, and anchored Switchable Normalization.

The backbone is a digit classifier trained with BatchNorm; the detector finds one digit on a noisy canvas, and each
network is trained at three learning rates. Takes half a minute: ``python examples/two_per_gpu.py``
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import normswap
from normswap.demo.digits import digits
from normswap.demo.torch import trained
from normswap.finetune import GateSchedule, Hooks, StopAtNaN

BATCH, STEPS, RATES = 2, 500, (0.1, 0.05, 0.02)


def canvases(data, seed):
    """Return canvases (N, 1, 24, 24) with a digit each, its class and the cell of its centre on the 12x12 map."""
    random, (images, labels) = np.random.default_rng(seed), data.batch(range(len(data)))
    places = random.integers(0, 17, (len(images), 2))
    found = random.normal(images.min(), 0.5, (len(images), 1, 24, 24)).astype(np.float32)
    for canvas, image, (top, left) in zip(found, images, places, strict=True):
        canvas[:, top : top + 8, left : left + 8] += image - images.min()
        canvas *= 3 ** random.uniform(-1, 1)  # photos differ in contrast
    return torch.from_numpy(found), torch.from_numpy(labels), torch.from_numpy((places + 4) // 2)


def train(model, data, rate, frozen, seed):
    """Train with two images a step; each map's 1,440 scores say class and place."""
    images, labels, cells = data
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    model.train(not frozen)
    with Hooks(GateSchedule(model, STEPS, freeze=0.1), StopAtNaN()) as hooks:
        for step, chosen in enumerate(np.random.default_rng(seed).integers(0, len(images), (STEPS, BATCH))):
            hooks.on_step(step)
            wanted = labels[chosen] * 144 + cells[chosen, 0] * 12 + cells[chosen, 1]
            loss = F.cross_entropy(model(images[chosen]).flatten(1), wanted)
            hooks.on_loss(step, loss)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def found(model, data):
    """Return the share of digits, in percent, whose class is right and whose cell is off by one at most."""
    images, labels, cells = data
    best = model(images).flatten(1).argmax(1)
    near = (torch.stack([best % 144 // 12, best % 12], 1) - cells).abs().amax(1) <= 1
    return 100 * float((near & (best // 144 == labels)).float().mean())


def main(rates=RATES, seed=0):
    """Return for each network the digits found at each rate."""
    learn, test = digits("channels_first")
    backbone = trained(learn)
    detector = nn.Sequential(*list(backbone)[:-3], nn.Conv2d(64, 10, 1))
    anchored = normswap.patch(detector, normswap.SwitchNorm(batch_statistics="frozen"), inplace=False).model
    networks = {"BatchNorm": detector, "frozen BatchNorm": detector, "anchored SN": anchored}
    data, test = canvases(learn, 1), canvases(test, 2)
    return {
        name: [found(train(copy.deepcopy(model), data, rate, name == "frozen BatchNorm", seed), test) for rate in rates]
        for name, model in networks.items()
    }


if __name__ == "__main__":
    print(f"digits found, %, at rates {RATES}")
    for name, shares in main().items():
        print(f"{name:18}", *(f"{share:6.1f}" for share in shares))
