"""The command line `normswap`: one group of commands."""

import os

import click

from .commands.demo import demo
from .commands.evaluate import evaluate
from .commands.export import export
from .commands.finetune import finetune
from .commands.inspect import inspect
from .commands.patch import patch
from .commands.plot import plot
from .commands.push import push
from .commands.report import report
from .commands.reproduce import reproduce
from .commands.verify import verify
from .console import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="normswap")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Take the BatchNorm out of a trained network without ruining it.

    MODEL is timm:NAME, torchvision:NAME, keras:NAME, file.py:callable, package.module:callable,
    a .keras/.h5/.hdf5 file, a .pt2 file of torch.export (with --trust), or a bundle made by `normswap patch`,
    which may be hf://OWNER/NAME, where `normswap push` wrote it.

    DATA is a folder with one subfolder of images per class, an .npz with arrays x and y, or hf:NAME[SPLIT]
    (a data set of Hugging Face's); any folder of images, or an .npz without y, where labels are not used.

    \b
    Examples:
      normswap inspect timm:resnet50 --input-shape 3,224,224
      normswap patch net.py:build --weights net.pth --to gn -o net-gn
      normswap export net-gn -o net-gn.onnx
      normswap finetune --help

    Exit codes: 0 ok, 1 internal error, 2 usage, 3 input rejected, 4 unsupported or nothing to do,
    5 verification failed or training went non-finite, 6 something not installed, 7 file system,
    130 stopped by Ctrl-C, 143 stopped by SIGTERM.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


for command in (inspect, patch, finetune, evaluate, export, verify, plot, report, push, reproduce, demo):
    main.add_command(command)
