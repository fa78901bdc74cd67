"""Write digits as folders of pictures, and a network trained on them with BatchNorm, for the command line to work on.

``python examples/digits.py`` writes ``digits/train``, ``digits/test`` and ``digits/network.safetensors``, whose
architecture is ``examples/digits.py:network``.
"""

from pathlib import Path

from normswap.demo.torch import build as network

FOLDER = Path("digits")


def main(folder=FOLDER):
    """Write both."""
    import numpy as np
    from PIL import Image
    from safetensors.torch import save_file
    from sklearn.datasets import load_digits

    from normswap.demo.digits import digits
    from normswap.demo.torch import trained

    bundled = load_digits()
    order = np.random.default_rng(0).permutation(len(bundled.images))  # as in normswap.demo.digits
    for name, chosen in (("train", order[500:]), ("test", order[:500])):
        for index in chosen:
            path = folder / name / str(bundled.target[index]) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(bundled.images[index] / 16 * 255)).save(path)
    save_file(trained(digits("channels_first")[0]).state_dict(), folder / "network.safetensors")


if __name__ == "__main__":
    main()

__all__ = ["main", "network"]
