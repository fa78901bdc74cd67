"""The command that shares a bundle on the Hugging Face Hub: push."""

from pathlib import Path

import click

from ..console import show
from .options import command, json_option, overwrite_option


@click.command()
@click.argument("bundle")
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--message", help="What the commit says.")
@click.option("--license", "licence", help="Licence for the card, by its name on the Hub: mit, apache-2.0 …")
@click.option("--onnx", type=Path, help="ONNX file exported of the bundle, to lie beside it; its verdict is told.")
@overwrite_option
@json_option
def push(
    bundle: str,
    repo: str,
    private: bool,
    message: str | None,
    licence: str | None,
    onnx: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write BUNDLE to a repository of the Hugging Face Hub, with a card of what is known of it.

    It is read again as hf://OWNER/NAME, in any command that takes a bundle and in normswap.load. To write needs
    `hf auth login` or HF_TOKEN; HF_ENDPOINT names another hub.

    \b
    Examples:
      normswap push net-gn-tuned me/net-gn --license mit
      normswap push net-gn-tuned me/net-gn --onnx net-gn.onnx --private
    """
    from ..bundles.manifest import local
    from ..interop import hub

    done = hub.push(
        local(bundle), repo, private=private, message=message, license=licence, onnx=onnx, overwrite=overwrite
    )
    spec = f"hf://{done.repo}"
    result = {"bundle": bundle, "repository": spec, "url": done.url, "commit": done.commit, "files": done.files}
    show(as_json, result, f"pushed to {done.url}, {len(done.files)} files", [command("inspect", spec)])
