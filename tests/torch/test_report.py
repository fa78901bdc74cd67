"""The page about a bundle, a run or a file: what is on it, and that reading it runs nothing."""

import json
import os
import shutil
from collections import OrderedDict
from html.parser import HTMLParser

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import normswap
from normswap.bundles import bundle
from normswap.bundles.manifest import SETTINGS, Drifts, read_manifest
from normswap.cli import main
from normswap.finetune.run.journal import ORIGINAL, Journal
from normswap.formats.seal import sealed

from ..browser import browser
from ..strangers import marks, stranger

NASTY = "<script>alert(1)</script>\"&'"
VOID = {"meta", "link", "br", "hr", "img", "input"}

CODE = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
                          nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    model[1].running_mean.uniform_(-1, 1)
    model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.3, 0.3, 0.3)}
    return model.eval()
"""


class Parsed(HTMLParser):
    """A page as it is read: tags with their attributes, texts, and whether each tag is closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open, self.wrong = [], [], [], []
        self.feed(text)
        self.wrong += self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if data.strip() and self.open and self.open[-1] != "style":
            self.texts.append(data.strip())

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return "\n".join(self.texts)


def invoke(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def page_of(*arguments, output="page.html", code=0):
    found, _, said = invoke("report", *arguments, "-o", output, "--overwrite")
    assert found == code, said
    with open(output, encoding="utf-8") as file:
        return Parsed(file.read())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a network, data, bundles of it and their files, and a run that was written down."""
    path = tmp_path_factory.mktemp("report")
    before = os.getcwd()
    os.chdir(path)
    try:
        (path / "net.py").write_text(CODE)
        rng = np.random.default_rng(0)
        np.savez(path / "data.npz", x=rng.integers(0, 255, (24, 8, 8, 3), np.uint8), y=rng.integers(0, 3, 24))
        for name, arguments in {"sn": ["sn", "--data", "data.npz"], "gn": ["gn", "--exclude", "4"]}.items():
            assert invoke("patch", "net.py:build", "--to", *arguments, "-o", name)[0] == 0
            assert invoke("export", name, "-o", f"{name}.onnx", "--no-latency")[0] == 0
        write_run(path / "sn")
    finally:
        os.chdir(before)
    return path


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of it that is the working folder."""
    path = shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(path)
    return path


def write_run(folder, steps=90):
    with Journal(folder / "run") as journal:
        journal.row(0, stage=ORIGINAL, eval_top1=81.35)
        for step in range(1, steps + 1):
            evaluated = 70 + step / 10 if step % 30 == 0 else None
            journal.row(step, stage="all", loss=2 / step, learning_rate=0.05, eval_top1=evaluated, epoch=step / 30)
    (folder / "run" / SETTINGS).touch()


class TestPage:
    @pytest.mark.parametrize("arguments", [["sn"], ["sn/run"], ["gn"], ["sn.onnx"], ["gn.onnx", "--latency"],
                                           ["sn.onnx", "--against", "net.py:build", "--timeout", "60"]])  # fmt: skip
    def test_is_whole(self, folder, arguments):
        """Tags are closed, nothing is loaded, no script is there; headings, tables and pictures tell what they are."""
        page = page_of(*arguments, code=5 if "net.py:build" in arguments else 0)
        headings = [tag for tag, _ in page.tags if tag in ("h1", "h2", "h3")]

        assert page.wrong == []
        assert not {"script", "iframe", "object", "img", "base", "form"} & {tag for tag, _ in page.tags}
        loads = {"src", "href", "xlink:href", "data", "action", "srcset", "poster"}
        assert [name for _, told in page.tags for name in told if name in loads or name.startswith("on")] == []
        assert {"default-src 'none'; style-src 'unsafe-inline'"} == {
            each["content"] for each in page.named("meta") if each.get("http-equiv")
        }
        assert headings[0] == "h1"
        assert headings.count("h1") == 1
        assert page.named("html") == [{"lang": "en"}]
        assert all(each.get("scope") in ("col", "row") for each in page.named("th"))
        assert len(page.named("caption")) == len(page.named("table")) > 0
        drawn = [each for each in page.named("svg") if "aria-hidden" not in each]
        assert all(each["role"] == "img" for each in drawn)
        assert len(drawn) <= len(page.named("title")) - 1

    def test_is_the_same_again(self, folder):
        """The same bundle gives the same bytes."""
        page_of("sn")
        first = (folder / "page.html").read_bytes()
        page_of("sn")

        assert (folder / "page.html").read_bytes() == first

    def test_names_are_texts(self, folder):
        """What a layer, a class, an output or a folder is called is shown and never read as HTML."""
        norm = type(NASTY, (nn.BatchNorm2d,), {})
        model = nn.Sequential(OrderedDict([("conv", nn.Conv2d(3, 4, 3)), (NASTY, norm(4))])).eval()
        normswap.save(normswap.patch(model, "sn", example=torch.zeros(1, 3, 8, 8)), "b")
        write_run(folder / "b", steps=3)
        with Journal(folder / "b" / "run") as journal:
            journal.row(4, stage=NASTY, loss=1.0)
        page = page_of("b")

        assert page.named("script") == []
        assert page.texts.count(NASTY) >= 2  # in the plan and in the gates
        assert f"all, then {NASTY}" in page.text
        assert page.wrong == []

    def test_names_in_a_file_are_texts(self, folder):
        """So is whatever an ONNX file says of itself."""
        proto = onnx.load("gn.onnx")
        text = proto.SerializeToString().decode("latin-1")
        assert text.count("1/grouped")
        norms = json.loads(next(p.value for p in proto.metadata_props if p.key == "normswap.norms"))
        for each in proto.metadata_props:
            if each.key == "normswap.norms":
                each.value = json.dumps({NASTY: norms["1"] | {"kind": NASTY}})
        for node in proto.graph.node:
            node.name = node.name.replace("1/", f"{NASTY}/{NASTY}")
        proto.producer_name = proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = NASTY
        onnx.save(proto, "nasty.onnx")
        page = page_of("nasty.onnx")

        assert page.named("script") == []
        assert f"Layers: {NASTY}" in page.texts
        assert f"output ({NASTY}, 3)" in page.texts
        assert page.wrong == []


class TestBundle:
    def test_plan_and_drift(self, folder):
        """Each layer is there with what it became, and its drift as expected and as measured."""
        told = json.loads(invoke("report", "sn", "-o", "page.html", "--json")[1])
        page = Parsed((folder / "page.html").read_text())
        manifest, _ = read_manifest(folder / "sn")

        assert told["kind"] == "bundle"
        assert [(each["name"], each["becomes"], each["front"]) for each in told["layers"]] == [
            ("1", "Switchable Normalization", "0"),
            ("4", "Switchable Normalization", "3"),
        ]
        for each in told["layers"]:
            assert each["expected"] == manifest.drift.expected[each["name"]] > 0
            assert each["measured"] == manifest.drift.measured[each["name"]] > 0
            assert f"{each['expected']:.3f}" in page.texts
            assert f"{each['measured']:.3f}" in page.texts
        assert "2 layers to Switchable Normalization" in page.texts
        assert f"output {manifest.drift.measured['output']:.3f}" in page.text
        assert told["run"]["steps"] == 90

    def test_a_layer_that_was_left(self, folder):
        """What the patch left is told, too, and what nobody measured has no column."""
        page = page_of("gn")

        assert "left as it is" in page.texts
        assert "expected drift" in page.texts
        assert "measured drift" not in page.texts
        assert "of the mean" not in page.texts

    def test_one_without_drift(self, folder):
        """A bundle of a version that did not write drift down has a page as well."""
        data = json.loads((folder / "gn/normswap.json").read_text())
        del data["seal"], data["drift"]
        (folder / "gn/normswap.json").write_text(json.dumps(sealed(data)))
        page = page_of("gn")

        assert "expected drift" not in page.texts
        assert normswap.load("gn", trust_code=True) is not None

    def test_strangers_code_stays(self, folder):
        """Of a stranger's bundle files alone are read."""
        path, _ = stranger(folder / "sn", folder, "payload.py:build")
        page_of(path)

        assert marks(folder) == []

    def test_drift_goes_on(self, folder):
        """What a patch told of its drift stays with the bundle that is made of it, and a later patch adds to it."""
        first = read_manifest(folder / "sn")[0].drift
        model = normswap.load("gn", trust_code=True)
        normswap.save(normswap.load("sn", trust_code=True), "again")
        assert read_manifest(folder / "again")[0].drift == first

        report = normswap.patch(model, "gn")
        normswap.save(report, "both")
        drift = read_manifest(folder / "both")[0].drift
        assert [*drift.expected] == ["1", "4"]
        assert drift.measured == {}
        assert bundle.read("both", trust_code=True).drift == drift
        assert Drifts.of({"a": float("inf"), "b": None, "c": 1.0}) == Drifts({"c": 1.0})


class TestRun:
    def test_curves(self, folder):
        """There is a picture for each figure that was written down, and no other."""
        page = page_of("sn")
        captions = [*dict.fromkeys(text for text in page.texts if text in CAPTIONS)]

        assert captions == ["Loss in training", "Top-1 accuracy, %", "Learning rate"]
        assert "original 81.35" in page.texts
        assert "The strong line of training is the mean of 6 steps." in page.texts
        assert "loss: from" not in page.text
        assert any(text.startswith("evaluation: from 73 at 30 to 79 at 90") for text in page.texts)

    def test_one_that_has_not_ended(self, folder):
        """A run that has come to no bundle is drawn as far as it goes."""
        write_run(folder / "unfinished", steps=2)
        code, told, _ = invoke("report", "unfinished", "-o", "page.html", "--json")

        assert code == 0
        assert json.loads(told)["kind"] == "run"
        assert "no, the curves are as far as it came" in Parsed((folder / "page.html").read_text()).texts

    @pytest.mark.parametrize("row", [
        "1,all,,1e308,,,,,,,,,", "1,all,,nan,,,,,,,,,", "1,all,,-inf,,inf,,,,,,,", f"{9**400},all,,1.0,,,,,,,,,",
        "-5,all,,1.0,,,,,,,,,", "1,all,,0.0,,,,,,,,,", "",
    ])  # fmt: skip
    def test_figures_of_a_damaged_file(self, folder, row):
        """Whatever stands in the table of a run, there is a page, and no number in a picture is none."""
        head = (folder / "sn/run/metrics.csv").read_text().splitlines()[0]
        (folder / "sn/run/metrics.csv").write_text(f"{head}\n{row}\n")
        page = page_of("sn")
        places = " ".join(each.get("points", "") for each in page.named("polyline"))

        assert page.wrong == []
        assert "nan" not in places
        assert "inf" not in places


CAPTIONS = {"Loss in training", "Top-1 accuracy, %", "Loss in evaluation", "Learning rate",
            "Drift of the scores from the original", "Channels that BRN clips, %", "Images per second"}  # fmt: skip


class TestFile:
    def test_what_norms_became(self, folder):
        """Each norm has its operators in the file, and one that went into a layer says which."""
        told = json.loads(invoke("report", "gn.onnx", "-o", "page.html", "--json")[1])
        page = Parsed((folder / "page.html").read_text())

        assert told["norms"] == [
            {"names": ["1"], "into": None,
             "nodes": ["Reshape", "InstanceNormalization", "Reshape", "BatchNormalization"]}
        ]  # fmt: skip
        assert "1 layer of gn: 4 operators" in page.texts
        assert "4 operators: Reshape, InstanceNormalization, Reshape, BatchNormalization" in page.texts
        assert invoke("patch", "net.py:build", "--to", "brn", "-o", "brn")[0] == 0
        assert invoke("export", "brn", "-o", "brn.onnx", "--no-latency")[0] == 0
        assert "2 layers of brn: no operator, folded into Conv" in page_of("brn.onnx").texts

    def test_gates_and_what_it_says_of_its_verdict(self, folder):
        """A file tells the gates itself, and what it says of its verdict is no proof."""
        page = page_of("sn.onnx")

        assert page.texts.count("0.05 · 0.05 · 0.90") == 4
        assert (
            "The file says that it passed 8 checks at a tolerance of 1e-05 when it was written. What a file says of "
            "itself is no proof: normswap verify MODEL sn.onnx proves it, and so does --against BUNDLE of this report."
        ) in page.texts

    def test_proof(self, folder):
        """Against the bundle it came from every check is shown, with the bundle's plan, and its original is timed."""
        code, told, _ = invoke(
            "report", "sn.onnx", "--against", "sn", "--trust-code", "--latency", "-o", "page.html", "--json"
        )
        told = json.loads(told)
        page = Parsed((folder / "page.html").read_text())

        assert code == 0
        assert told["verdict"]["passed"]
        assert page.texts.count("passed") == len(told["verdict"]["checks"]) + 1
        assert {*told["latency"]} == {"its original", "sn.onnx"}
        assert {*told["latency"]["sn.onnx"]} == {"1", "8"}
        assert page.texts.count("Gates by layer") == 1
        assert "Plan and drift by layer" in page.texts

    def test_a_proof_that_fails(self, folder):
        """Against another model the page shows what failed and first where, and the exit code is 5."""
        code, told, said = invoke("report", "sn.onnx", "--against", "gn", "--trust-code", "-o", "page.html", "--json")
        page = Parsed((folder / "page.html").read_text())

        assert (code, said) == (5, "")
        told = json.loads(told)["verdict"]
        assert not told["passed"]
        assert told["first_diverging"]
        assert "failed" in page.texts
        assert "The file does not compute what gn computes." in page.texts
        assert f"first diverging layer: {told['first_diverging']}" in page.texts

    def test_a_norm_that_is_too_much(self, folder):
        """A file can say that any number of operators are one norm: these are told and not drawn."""
        proto = onnx.load("gn.onnx")
        norm = [node for node in proto.graph.node if node.name.startswith("1/")][-1]
        index = [*proto.graph.node].index(norm)
        chain = [onnx.helper.make_node("Identity", [f"v{i}"], [f"v{i + 1}"], name=f"1/{i}") for i in range(5000)]
        last, norm.output[0] = norm.output[0], "v0"
        chain[-1].output[0] = last
        for offset, node in enumerate(chain, 1):
            proto.graph.node.insert(index + offset, node)
        onnx.save(proto, "long.onnx")
        page = page_of("long.onnx")

        assert "5004 operators, too many to be drawn" in page.texts

    def test_of_others(self, folder):
        """A file that normswap did not write has a page of what any file tells."""
        proto = onnx.load("gn.onnx")
        del proto.metadata_props[:]
        onnx.save(proto, "other.onnx")
        page = page_of("other.onnx")

        assert "What the norms became" not in page.texts
        assert "The file does not tell that it was proved; normswap verify MODEL other.onnx proves it, and so does " \
            "--against BUNDLE of this report." in page.texts  # fmt: skip

    def test_what_is_stored_is_read_as_declared(self, folder):
        """What a file says of its norms is refused by name where it is of another kind."""
        proto = onnx.load("gn.onnx")
        for each in proto.metadata_props:
            if each.key == "normswap.norms":
                each.value = '{"1": {"kind": 3, "eps": 1e-05}}'
        onnx.save(proto, "other.onnx")
        code, _, said = invoke("report", "other.onnx", "-o", "page.html")

        assert (code, said) == (
            3,
            "error: expected text at norms.1.kind in the metadata of other.onnx, received 3; export the model again\n",
        )
        assert not (folder / "page.html").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["none", "-o", "p.html"], 3, "error: expected a bundle, a fine-tuning run or a FILE.onnx, received none, "
         "nothing there\n"),
        (["data.npz", "-o", "p.html"], 3, "error: expected a bundle, a fine-tuning run or a FILE.onnx, received "
         "data.npz, a file\n"),
        (["sn", "-o", "p.pdf"], 2, "Error: Invalid value for '-o': expected a file ending in .html, received p.pdf\n"),
        (["sn", "--latency", "-o", "p.html"], 2, "Error: expected a FILE.onnx to be proved or timed, received "
         "--latency\n"),
        (["sn", "--trust-code", "-o", "p.html"], 2, "Error: expected --against BUNDLE to trust, received "
         "--trust-code\n"),
        (["sn.onnx", "--timeout", "5", "-o", "p.html"], 2, "Error: expected --against or --latency, which take time, "
         "received --timeout\n"),
        (["sn", "-o", "sn.html"], 2, "error: expected an output path that does not exist, received sn.html; add "
         "--overwrite\n"),
        (["none.onnx", "-o", "p.html"], 3, "error: expected a file at none.onnx, received nothing there\n"),
    ],
)  # fmt: skip
def test_what_is_refused(folder, arguments, code, message):
    """Each with its exit code and a whole message, and nothing is written."""
    (folder / "sn.html").write_text("mine")
    found, _, said = invoke("report", *arguments)

    assert (found, said[said.lower().index("error:"):]) == (code, message)  # fmt: skip
    assert not (folder / "p.html").exists()
    assert (folder / "sn.html").read_text() == "mine"


def test_a_file_that_cannot_be_timed(folder):
    """Inputs that are no float32 of a known size are named."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten()).eval()
    normswap.to_onnx(model, "ids.onnx", example=torch.zeros(2, 3, dtype=torch.int64))
    code, _, said = invoke("report", "ids.onnx", "--latency", "-o", "p.html")

    assert (code, said) == (
        4,
        "error: expected a file whose inputs are float32 of known sizes beside --latency, received input "
        "('batch', 3); leave that out\n",
    )


CONTRAST = """
(() => {
  const light = c => { const l = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                       return .2126 * l[0] + .7152 * l[1] + .0722 * l[2]; };
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const ground = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
                                                          if (c.length < 4 || c[3] > 0) return c; }
                        return [255, 255, 255]; };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || ["TITLE", "DESC", "title", "desc"].includes(e.tagName)) continue;
    const style = getComputedStyle(e), drawn = e instanceof SVGElement;
    const [a, b] = [light(rgb(drawn ? style.fill : style.color)), light(ground(e).slice(0, 3))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) poor.push([walker.currentNode.data.trim().slice(0, 40), ratio]);
  }
  return poor;
})()
"""


@pytest.mark.slow
def test_in_a_browser(folder):
    """On a phone and on a desk, light and dark: nothing is loaded, nothing sticks out, and all texts can be read."""
    long = nn.Sequential(OrderedDict([("conv", nn.Conv2d(3, 4, 3)), ("bn" * 120, nn.BatchNorm2d(4))])).eval()
    normswap.save(normswap.patch(long, "sn", example=torch.zeros(1, 3, 8, 8)), "long" * 20)
    page_of("sn", output="bundle.html")
    page_of("long" * 20, output="long.html")
    page_of("sn.onnx", "--against", "sn", "--trust-code", "--latency", output="file.html")
    with browser(folder / "profile") as tab:
        for name in ("bundle.html", "long.html", "file.html"):
            grounds = []
            for width, dark in ((375, False), (375, True), (1280, False), (1280, True)):
                tab.open(folder / name, width, dark=dark)
                requests = [each["request"]["url"] for each in tab.of("Network.requestWillBeSent")]

                tab.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
                sizes = "(page => [innerWidth, page.scrollWidth - page.clientWidth])(document.documentElement)"
                assert tab.evaluate(sizes) == [width, 0], name
                assert {url.partition(":")[0] for url in requests} <= {"file", "data"}
                assert [url for url in requests if url.startswith("file")] == [(folder / name).as_uri()]
                assert tab.of("Log.entryAdded") == []
                assert tab.evaluate(CONTRAST) == []
                grounds.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert grounds[0] == grounds[2] != grounds[1] == grounds[3]
