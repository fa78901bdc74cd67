"""Fine-tune under differential privacy with Opacus: its own GroupNorm, a patched one, and anchored SN.

The network is trained with BatchNorm on 500 public digits, and learns 1,000 private ones, which are mirrored.
Takes half a minute: ``python examples/private.py``
"""

import copy
import warnings

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap.demo.digits import digits
from normswap.demo.torch import trained
from normswap.interop.opacus import register_opacus

EPOCHS, BATCH, RATE, CLIP, NOISE, DELTA = 10, 64, 0.1, 1.0, 3.0, 1e-3


def privately(model, images, labels, epochs):
    """Train with DP-SGD, and return the model and the epsilon spent."""
    torch.manual_seed(0)
    engine = PrivacyEngine(accountant="rdp")
    wrapped, optimizer, loader = engine.make_private(
        module=model.train(),
        optimizer=torch.optim.SGD(model.parameters(), RATE),
        data_loader=DataLoader(TensorDataset(images, labels), batch_size=BATCH),
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
    )
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
    return model.eval(), engine.get_epsilon(DELTA)


def main(epochs=EPOCHS):
    """Return for each network the accuracy on private images before and after, and epsilon."""
    warnings.filterwarnings("ignore", "Full backward hook is firing|Secure RNG")
    people, public = digits("channels_first")
    original = trained(public)
    images, labels = map(torch.from_numpy, people.batch(range(len(people))))
    images, private, test = images.flip(-1), slice(1000), slice(1000, None)
    register_opacus()
    networks = {
        "Opacus's fix": ModuleValidator.fix(copy.deepcopy(original)),
        "GroupNorm, patched": normswap.patch(original, "gn", example=images[:2], inplace=False).model,
        "anchored SN": normswap.patch(original, normswap.SwitchNorm(batch_statistics="frozen"), inplace=False).model,
    }

    def top1(model):
        with torch.no_grad():
            return 100 * float((model.eval()(images[test]).argmax(1) == labels[test]).float().mean())

    rows = {"BatchNorm": (top1(original), None, None)}
    for name, model in networks.items():
        before = top1(model)
        model, epsilon = privately(model, images[private], labels[private], epochs)
        rows[name] = (before, top1(model), epsilon)
    return rows


if __name__ == "__main__":
    for name, (before, after, epsilon) in main().items():
        print(f"{name:20}{before:7.1f} %", "" if after is None else f"-> {after:.1f} % at epsilon {epsilon:.2f}")
