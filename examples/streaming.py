"""Adapt on a device to a stream of single images, and deploy the result as an ONNX file.

Each image is predicted, then learned from, by the norms' parameters and the biases alone. The network was trained with
BatchNorm on other digits; those of the streams are mirrored or negative. Takes half a minute:
``python examples/streaming.py``
"""

import copy
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import normswap
from normswap.demo.digits import digits
from normswap.demo.torch import trained

RATE, LAST = 0.03, 300
STREAMS = {"mirrored": lambda images: images.flip(-1), "negative": lambda images: -images}


def follow(model, images, labels, *, frozen):
    """Learn from each image in turn; return how many of the last ones were predicted right, in percent."""
    learned = [parameter for parameter in model.parameters() if parameter.dim() == 1]  # γ, β, gates, biases
    model.requires_grad_(False)
    for parameter in learned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(learned, RATE, momentum=0.9)
    right = []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        with torch.no_grad():
            right.append(model.eval()(image).argmax(1) == label)
        model.train(not frozen)
        optimizer.zero_grad()
        F.cross_entropy(model(image), label).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
    model.eval()
    return 100 * float(torch.cat(right[-LAST:]).float().mean())


def main(stream, count=1297):
    """Return for each network the share of the last images that were right, and whether its ONNX file is proved."""
    own, public = digits("channels_first")
    original = trained(public)
    images, labels = map(torch.from_numpy, own.batch(range(count)))
    images = STREAMS[stream](images)
    with torch.no_grad():
        shares = {"as it was": 100 * float((original(images).argmax(1) == labels)[-LAST:].float().mean())}
    anchored = normswap.patch(original, normswap.SwitchNorm(batch_statistics="frozen"), inplace=False).model
    for name, model in {
        "BatchNorm": original,
        "frozen BatchNorm": copy.deepcopy(original),
        "anchored SN": anchored,
    }.items():
        shares[name] = follow(model, images, labels, frozen=name == "frozen BatchNorm")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapted.onnx"
        normswap.to_onnx(anchored, path, example=images[:1])
        return shares, bool(normswap.verify(anchored, path))


if __name__ == "__main__":
    for stream in STREAMS:
        shares, proved = main(stream)
        print(f"{stream}: right of the last {LAST}:", ", ".join(f"{k} {v:.1f} %" for k, v in shares.items()))
        print("its ONNX file is", "proved" if proved else "refused")
