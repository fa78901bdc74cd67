"""Bundles on a hub: pushed in one commit with a card, and read by the rules for any bundle; the hub is on loopback."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

import normswap
from normswap.cli import main
from normswap.errors import InputError
from normswap.finetune.run.journal import ORIGINAL, Journal
from normswap.interop.card import code_span

from ..helpers import exactly
from ..hub_server import TOKEN, serving
from ..strangers import marks, refusal, stranger

CODE = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(8, 3))
    model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.3, 0.3, 0.3)}
    return model.eval()
"""

# What `huggingface_hub` asks of its HTTP client in an old way; Python shows no one but pytest.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def invoke(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def run(*arguments):
    code, _, said = invoke(*arguments)
    assert code == 0, said
    return said


def build():
    namespace = {}
    exec(CODE, namespace)
    return namespace["build"]()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a network, two bundles of it, their files, and one of a network of this library's own."""
    path = tmp_path_factory.mktemp("hub")
    before = os.getcwd()
    os.chdir(path)
    try:
        (path / "net.py").write_text(CODE)
        rng = np.random.default_rng(0)
        np.savez(path / "data.npz", x=rng.integers(0, 255, (24, 8, 8, 3), np.uint8), y=rng.integers(0, 3, 24))
        for kind in ("sn", "gn"):
            run("patch", "net.py:build", "--to", kind, "--data", "data.npz", "-o", kind)
            run("export", kind, "-o", f"{kind}.onnx", "--no-latency")
        run("patch", "normswap.models.torch:resnet18_v1", "--to", "gn", "-o", "zoo")
    finally:
        os.chdir(before)
    return path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that `huggingface_hub` asks in place of its own, with a cache and a login of this test's."""
    from huggingface_hub import constants

    with serving() as found:
        for name, value in {
            "ENDPOINT": found.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": found.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "hf" / "token"),
            "HF_STORED_TOKENS_PATH": str(tmp_path / "hf" / "stored_tokens"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    path = shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(path)
    return path


class TestPush:
    def test_and_read_again(self, hub, folder):
        """What is pushed is what is read: the same weights, by every command that takes a bundle."""
        code, told, _ = invoke("push", "sn", "me/net-sn", "--json")
        told = json.loads(told)
        repo = hub.repos["me/net-sn"]

        assert code == 0
        assert told == {
            "schema_version": 1,
            "bundle": "sn",
            "repository": "hf://me/net-sn",
            "url": f"{hub.url}/me/net-sn",
            "commit": repo.commits[-1][0],
            "files": ["README.md", "model.safetensors", "normswap.json", "original.safetensors"],
        }
        assert not repo.private
        assert repo.messages[-1] == f"Push a bundle with normswap {normswap.__version__}"
        loaded = normswap.load("hf://me/net-sn", model=build())
        wanted = normswap.load("sn", model=build())
        assert all(torch.equal(one, wanted.state_dict()[name]) for name, one in loaded.state_dict().items())
        trusted = ["hf://me/net-sn", "--trust-code"]
        (folder / "own").mkdir()
        run("inspect", "hf://me/net-sn")
        run("plot", "hf://me/net-sn", "-o", "gates.png")
        run("report", "hf://me/net-sn", "-o", "page.html")
        assert "<h1>hf://me/net-sn</h1>" in (folder / "page.html").read_text()

        zoo = ["push", "zoo", "me/zoo"]
        run(*zoo)
        assert normswap.load("hf://me/zoo") is not None
        assert "next: normswap patch hf://me/zoo" not in run("inspect", "hf://me/zoo")
        assert invoke("verify", *trusted[:1], "sn.onnx")[0] == 3

    def test_commands_that_build_it(self, hub, folder):
        """With trust each command that builds a bundle's model builds that of a hub, and makes bundles of it."""
        shutil.copy("net.py", folder / "sn" / "net.py")
        run("push", "gn", "me/gn")
        shutil.rmtree("gn")
        code = 'from pathlib import Path; import sys; sys.path.insert(0, "."); exec(Path("net.py").read_text())\n'
        (folder / "beside.py").write_text(code)
        path, _ = stranger(folder / "sn", folder, "payload.py:build")
        (path / "payload.py").write_text(CODE)
        hub.add("me/own", path)
        hub.add("me/own.onnx", path)
        for command in (
            ["export", "hf://me/own", "-o", "new.onnx", "--no-latency"],
            ["verify", "hf://me/own", "sn.onnx"],
            ["evaluate", "hf://me/own", "--data", "data.npz"],
            ["evaluate", "hf://me/own.onnx", "--data", "data.npz"],
            ["evaluate", "sn.onnx", "--data", "data.npz", "--against", "hf://me/own"],
            ["finetune", "hf://me/own", "--data", "data.npz", "--steps", "1", "-o", "tuned"],
            ["report", "sn.onnx", "--against", "hf://me/own", "-o", "page.html"],
        ):
            assert invoke(*command)[0] == 3, command
            run(*command, "--trust-code")
        assert invoke("export", "tuned", "-o", "tuned.onnx")[0] == 3  # the code is its author's still

    def test_the_card(self, hub, folder):
        """It tells what is known, and how the bundle is loaded, in YAML and Markdown."""
        with Journal(folder / "sn" / "run") as journal:
            journal.row(0, stage=ORIGINAL, eval_top1=81.35)
            journal.row(10, stage="all", loss=1.0, eval_top1=84.5)
        run("push", "sn", "me/net-sn", "--license", "apache-2.0", "--onnx", "sn.onnx")
        files = hub.repos["me/net-sn"].files
        text = files["README.md"].decode()
        _, front, body = text.split("---\n", 2)
        manifest = json.loads((folder / "sn/normswap.json").read_text())

        assert yaml.safe_load(front) == {
            "license": "apache-2.0",
            "library_name": "normswap",
            "tags": ["normswap", "pytorch", "switchable-normalization", "onnx"],
        }
        assert body.splitlines()[1] == "# net-sn"
        for line in (
            'model = normswap.load("hf://me/net-sn", model=build())',
            "`build` returns a fresh network of its architecture, of which the code is not here.",
            "| replaced | 1 layer to Switchable Normalization |",
            "| top-1 | 84.50 %, on the images it was evaluated on, after step 10 |",
            "| top-1 before the patch | 81.35 % |",
            f"| `1` | Switchable Normalization | 8 | {manifest['drift']['expected']['1']:.3f} | "
            f"{manifest['drift']['measured']['1']:.3f} |",
            "`model.onnx` is the same network with its statistics folded. It says of itself that it passed 8 checks at "
            'a tolerance of 1e-05 of scale against the bundle; `normswap.verify(model, "model.onnx")` proves it.',
        ):
            assert line in body.splitlines()
        assert files["model.onnx"] == (folder / "sn.onnx").read_bytes()
        assert "run/metrics.csv" in files

    def test_a_card_without_licence(self, hub, folder):
        """Where nobody names a licence the card says so, and one of this library's networks is loaded as it is."""
        run("push", "zoo", "me/zoo")
        text = hub.repos["me/zoo"].files["README.md"].decode()

        assert "license" not in yaml.safe_load(text.split("---\n", 2)[1])
        assert "**Its licence is not told:** ask who pushed it before you use it." in text
        assert '\nmodel = normswap.load("hf://me/zoo")\n' in text

    def test_only_what_is_the_bundles_goes(self, hub, folder):
        """Settings of a run, checkpoints and strays stay here; code goes if it lies in the bundle and is its source."""
        with Journal(folder / "sn" / "run") as journal:
            journal.row(1, stage="all", loss=1.0)
        (folder / "sn/run/run.toml").write_text("data = '/home/me'")
        (folder / "sn/notes.txt").write_text("mine")
        path, _ = stranger(folder / "sn", folder, "payload.py:build")
        run("push", path, "me/code")

        assert {*hub.repos["me/code"].files} == {
            *(".gitattributes", "README.md", "model.safetensors", "normswap.json", "original.safetensors"),
            *("payload.py", "run/metrics.csv"),
        }
        assert "in this repository: look at it before you trust it." in hub.repos["me/code"].files["README.md"].decode()
        assert marks(folder) == []

    def test_overwrite(self, hub, folder):
        """A bundle gives way to another with --overwrite alone, whole and in one commit; other things never do."""
        run("push", "sn", "me/net", "--private", "--onnx", "sn.onnx")
        repo = hub.repos["me/net"]
        assert repo.private
        before = len(repo.commits)

        assert invoke("push", "gn", "me/net")[::2] == (
            2,
            "error: expected a repository without a bundle, received me/net; add --overwrite\n",
        )
        assert len(repo.commits) == before
        normswap.save(normswap.patch(build(), "gn"), "bare")
        run("push", "bare", "me/net", "--overwrite", "--message", "Another")
        assert (len(repo.commits), repo.messages[-1]) == (before + 1, "Another")
        assert {*repo.files} == {".gitattributes", "README.md", "model.safetensors", "normswap.json"}
        assert normswap.load("hf://me/net", model=build()) is not None

        (folder / "other").mkdir()
        (folder / "other/config.json").write_text("{}")
        hub.add("me/other", folder / "other")
        for options in ([], ["--overwrite"]):
            assert invoke("push", "gn", "me/other", *options)[::2] == (
                2,
                "error: expected a repository with a bundle or nothing in it, received me/other with 2 files of "
                "others; push to another one\n",
            )
        hub.add("me/public", folder / "bare")
        assert invoke("push", "gn", "me/public", "--private", "--overwrite")[::2] == (
            2,
            "error: expected a private repository for --private, received me/public, which is there and public; push "
            "to another one\n",
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["sn", "net"], "expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION, received hf://net"),
            (["sn", "me/net@main"], "expected a repository as OWNER/NAME, received me/net@main"),
            (["sn", "../net"], "expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION, received hf://../net"),
            (["none", "me/net"], "expected a bundle in none, received no folder; make one with `normswap patch`"),
            (["sn", "me/net", "--onnx", "gn.onnx"], "expected an ONNX file of the bundle, with its 1 norms, received "
             "gn.onnx with 1 of other names or kinds"),
        ],
    )  # fmt: skip
    def test_what_is_refused(self, hub, folder, arguments, message):
        """Before the hub is asked anything."""
        assert invoke("push", *arguments)[::2] == (3, f"error: {message}\n")
        assert hub.requests == []


class TestRead:
    def test_a_revision(self, hub, folder):
        """After @ stands a commit, and it is that commit's bundle."""
        run("push", "sn", "me/net")
        first = hub.repos["me/net"].commits[-1][0]
        run("push", "gn", "me/net", "--overwrite")

        for spec, kind in ((f"hf://me/net@{first}", "sn"), ("hf://me/net@main", "gn"), ("hf://me/net", "gn")):
            told = json.loads(invoke("inspect", spec, "--json")[1])
            assert [site["patched_to"] for site in told["sites"]] == [kind]

    def test_without_a_connection(self, hub, folder, monkeypatch):
        """What was fetched once is read without the hub."""
        run("push", "gn", "me/net")
        run("inspect", "hf://me/net")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

        run("inspect", "hf://me/net")
        assert invoke("inspect", "hf://me/other")[::2] == (
            3,
            f"error: expected an answer of {hub.url} for me/other, received none, since HF_HUB_OFFLINE is set; "
            "unset it\n",
        )

    @pytest.mark.parametrize("source", ["payload.py:build", "os:abort", "timm:hf-hub:stranger/x"])
    def test_strangers_code(self, hub, folder, source):
        """A source that is code is run for nobody who does not trust it, and the message names the repository."""
        path, _ = stranger(folder / "sn", folder, source)
        hub.add("them/net", path)
        with pytest.raises(InputError) as raised:
            normswap.load("hf://them/net")
        code, _, said = invoke("export", "hf://them/net", "-o", "new.onnx")

        assert " in hf://them/net; if you trust that code, pass trust_code=True" in str(raised.value)
        assert (code, said.partition("; ")[2]) == (3, "if you trust that code, add --trust-code\n")
        for command in (["inspect", "hf://them/net"], ["report", "hf://them/net", "-o", "page.html"]):
            run(*command)
        assert marks(folder.parent) == []
        if source.startswith("os:"):
            assert said == f"error: {refusal('hf://them/net', source)}\n"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda path: (path / "model.safetensors").write_bytes(b"x"),
             "expected {at}/model.safetensors as it was saved, received a file that is missing or has changed; take "
             "the bundle from where it came once more, or patch the model again"),
            (lambda path: (path / "model.safetensors").unlink(),
             "expected {at}/model.safetensors as it was saved, received a file that is missing or has changed; take "
             "the bundle from where it came once more, or patch the model again"),
            (lambda path: (path / "model.keras").write_bytes(b"x"),
             "expected every file beside it at sha256 in {at}/normswap.json, received model.keras, which is there and "
             "not listed; take the bundle from where it came once more, or patch the model again"),
        ],
    )  # fmt: skip
    def test_hashes_are_checked(self, hub, folder, tmp_path, change, message):
        """A repository is held to its manifest as any folder is; what a hub puts beside it is passed over."""
        (folder / "gn/README.md").write_text("hello")
        (folder / "gn/LICENSE").write_text("MIT")
        repo = hub.add("them/net", folder / "gn")
        assert {".gitattributes", "README.md", "LICENSE"} < {*repo.files}
        run("inspect", "hf://them/net")
        change(folder / "gn")
        sha = hub.add("them/net", folder / "gn").commits[-1][0]
        at = tmp_path / "hf/hub/models--them--net/snapshots" / sha

        assert invoke("inspect", f"hf://them/net@{sha}")[::2] == (3, f"error: {message.format(at=at)}\n")

    def test_links_elsewhere_are_refused(self, folder):
        """A folder that only looks like one of the cache's is held to what any folder is."""
        for blob in (folder / "secret", folder / "theirs/blobs/x"):
            snapshot = folder / "theirs/snapshots/0"
            shutil.rmtree(folder / "theirs", ignore_errors=True)
            shutil.copytree("gn", snapshot)
            blob.parent.mkdir(parents=True, exist_ok=True)
            (snapshot / "model.safetensors").rename(blob)
            (snapshot / "model.safetensors").symlink_to(blob)
            inside = "theirs" in str(blob)
            assert invoke("inspect", snapshot)[0] == (0 if inside else 3)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("hf://them/none", "expected a repository them/none at {at}, received none that can be seen; check its "
             "name, and if it is private log in with `hf auth login`, or set HF_TOKEN"),
            ("hf://them/gated", "expected leave to read them/gated at {at}, received status 403: it is gated; ask for "
             "access at {at}/them/gated, and log in with `hf auth login`, or set HF_TOKEN"),
            ("hf://them/net@v9", "expected a revision of them/net at {at}, received 'v9', which it has not"),
            ("hf://them/other", "expected a bundle in hf://them/other, received a repository without normswap.json at "
             "{at}; make one with `normswap push`"),
            ("hf://them/forbidden", "expected leave to read them/forbidden at {at}, received status 403; log in with "
             "`hf auth login`, or set HF_TOKEN to a token that may read it"),
            ("hf://them/broken", "expected {at} to read them/broken, received status 500; try again later"),
            ("hf://net", "expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION, received hf://net"),
            ("hf://a/../../b", "expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION, received hf://a/../../b"),
        ],
    )  # fmt: skip
    def test_what_a_hub_does_not_give(self, hub, folder, monkeypatch, spec, message):
        """Each says what was asked, what came, and what to do: at the command line with exit code 3, and in Python."""
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        (folder / "other").mkdir()
        (folder / "other/config.json").write_text("{}")
        hub.add("them/net", folder / "gn")
        hub.add("them/other", folder / "other")
        hub.add("them/gated", folder / "gn", state="gated")
        hub.failing = {"them/forbidden": 403, "them/broken": 500}
        message = message.format(at=hub.url)

        for command in (["inspect", spec], ["export", spec, "-o", "new.onnx"], ["report", spec, "-o", "new.html"],
                        ["evaluate", "gn.onnx", "--data", "data.npz", "--against", spec]):  # fmt: skip
            assert invoke(*command)[::2] == (3, f"error: {message}\n")
        with pytest.raises(InputError, match=exactly(message)):
            normswap.load(spec)

    @pytest.mark.parametrize("command", [["inspect", "hf://me/net"], ["push", "sn", "me/net"]])
    def test_a_hub_that_is_not_there(self, hub, folder, monkeypatch, command):
        """Nothing answers: said with where it was asked."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            at = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", at)
        template = at + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        code, _, said = invoke(*command)

        assert code == 3
        assert said.startswith(f"error: expected an answer of {at} for me/net, received none: ")
        assert said.endswith("; check the connection, and HF_ENDPOINT if that is set\n")
        assert said.count("\n") == 1

    def test_a_push_that_may_not(self, hub, folder, monkeypatch):
        """Without a login, or where the hub refuses the commit, it says so and the old bundle is whole."""
        run("push", "sn", "me/net")
        repo = hub.repos["me/net"]
        before = len(repo.commits)
        hub.failing = {"POST .*/commit/": 403}
        assert invoke("push", "gn", "me/net", "--overwrite")[::2] == (
            3,
            f"error: expected leave to write me/net at {hub.url}, received status 403; log in with `hf auth login`, or "
            "set HF_TOKEN to a token that may write it\n",
        )
        assert len(repo.commits) == before
        hub.failing = {}
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        assert invoke("push", "gn", "me/new")[::2] == (
            3,
            f"error: expected leave to write me/new at {hub.url}, received status 401; log in with `hf auth login`, or "
            "set HF_TOKEN to a token that may write it\n",
        )
        assert "me/new" not in hub.repos


def test_by_the_environment(hub, folder, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_TOKEN are all it takes, and nothing is left elsewhere in the user's home."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "other"),
        "HF_TOKEN": TOKEN,
        "HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    (tmp_path / "home").mkdir()
    for command in (["push", "gn", "me/net"], ["inspect", "hf://me/net", "--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "normswap", *command], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    assert json.loads(done.stdout)["model"] == "hf://me/net"
    assert (tmp_path / "other/hub/models--me--net").is_dir()
    assert [*(tmp_path / "home").rglob("models--*")] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [("bn1", "`bn1`"), ("a|b", "`a\\|b`"), ("a`b", "`` a`b ``"), ("<b>\n# x", "`<b> # x`"), ("", "` `")],
)
def test_names_in_a_card(text, shown):
    """Names are shown letter by letter, and end no line, cell or span."""
    assert code_span(text) == shown
