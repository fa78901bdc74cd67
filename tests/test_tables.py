"""What `print` shows of a plan and a report: tables that fit a screen, however deep the network."""

import numpy as np
import pytest

import normswap
from normswap.convert.state import BatchNormState
from normswap.patchers.plan import Report, Site, decide
from normswap.patchers.table import as_text, folded, plan_table, summarised


def resnet50():
    """The sites of a ResNet-50 on 224x224 images."""
    sites = [Site("bn1", "BatchNorm2d", 64, spatial=(112, 112))]
    side = 56
    for stage, depth in enumerate((3, 4, 6, 3)):
        width, name = 64 * 2**stage, f"layer{stage + 1}"
        for block in range(depth):
            smaller = side // 2 if block == 0 and stage else side
            sites.append(Site(f"{name}.{block}.bn1", "BatchNorm2d", width, spatial=(side, side)))
            sites.append(Site(f"{name}.{block}.bn2", "BatchNorm2d", width, spatial=(smaller, smaller)))
            sites.append(Site(f"{name}.{block}.bn3", "BatchNorm2d", 4 * width, spatial=(smaller, smaller)))
            side = smaller
            if block == 0:
                sites.append(Site(f"{name}.0.downsample.1", "BatchNorm2d", 4 * width, spatial=(side, side)))
    return sites


def state_of(name):
    """Values that differ from site to site."""
    random = np.random.default_rng(sum(map(ord, name)))
    return BatchNormState(np.ones(8), np.zeros(8), random.normal(size=8), random.uniform(0.5, 2, 8), 1e-5)


def planned(sites, **options):
    """A plan that makes GroupNorms of the sites."""
    return decide("torch", sites, normswap.GroupNorm(groups=2), state_of=state_of, **options)


class TestFolding:
    def test_a_plan_fits_a_screen(self):
        """53 layers are 12 rows of at most 100 columns, and with what stands around them fewer than 24 lines."""
        plan = planned(resnet50())
        lines = str(plan).splitlines()

        assert lines[0] == "plan for 53 BatchNorms"
        assert [line.split("  ")[0] for line in lines[3:6]] == [
            "bn1",
            "layer1.*.bn* (6)",
            "layer1.*.bn3, layer1.0.downsample.1 (4)",
        ]
        assert len(lines) <= 20
        assert max(map(len, lines)) <= 100
        assert str(plan).isascii()
        assert lines[-1] == "all are BatchNorm2d; plan.table(all=True) shows every layer"

    def test_every_layer(self):
        """On demand each has a row, in the model's order."""
        sites = resnet50()
        lines = planned(sites).table(all=True).splitlines()

        assert [line.split()[0] for line in lines[3 : 3 + len(sites)]] == [site.name for site in sites]

    @pytest.mark.parametrize("count", [15, 160])
    def test_layers_of_many_widths(self, count):
        """Where each layer has a width of its own the row tells the range."""
        sites = [Site(f"blocks.{n}.norm", "BatchNorm2d", 8 + 4 * n, spatial=(16, 16)) for n in range(count)]
        lines = str(planned(sites)).splitlines()

        assert len(lines) == 8
        assert lines[5].startswith("together: about ")
        assert lines[3].startswith(f"blocks.*.norm ({count})  8-{4 + 4 * count}  16x16  gn groups=2  0.")

    def test_what_is_told_apart(self):
        """Layers that are left, refused or known by several names are rows of their own."""
        sites = [Site(f"a.{n}", "BatchNorm2d", 8) for n in range(14)]
        sites += [Site("b.0", "BatchNorm2d", 8, obstacle="it clips"), Site("c.0", "BatchNorm2d", 8, aliases=("d.0",))]
        lines = str(planned(sites, exclude=["a.1"])).splitlines()

        assert [line.split("  ")[0] for line in lines[3:7]] == ["a.* (13)", "a.1", "b.0", "c.0 = d.0"]
        assert "(refused)" in lines[5]

    def test_the_worst_are_named(self):
        """Of what is folded the layers with the largest drift are named, expected and measured."""
        plan = planned([Site(f"a.{n}", "BatchNorm2d", 8) for n in range(20)])
        drift = {decision.site.name: decision.drift for decision in plan.decisions}
        worst = sorted(drift, key=lambda name: -drift[name])[:3]
        found = [{"name": f"a.{n}", "rms": n / 100, "max": n / 50} for n in range(20)]
        text = as_text(plan_table("plan", plan.decisions, [*found, {"name": "output", "rms": 0.5, "max": None}]))

        assert f"largest drift: {', '.join(f'{name} {drift[name]:.2f}' for name in worst)}\n" in text
        assert "largest measured: a.19 0.19, a.18 0.18, a.17 0.17\n" in text
        assert "output: off by 50.0 % of its root mean square, ? at most\n" in text

    def test_figures_that_are_not_known(self):
        """A layer of which nothing is expected is not among those of which something is."""
        rows = [{"name": f"a.{n}", "drift": None if n < 2 else 0.5} for n in range(20)]

        assert folded(rows, ["drift"]) == [
            {"name": "a.{0,1} (2)", "drift": None},
            {"name": "a.* (18)", "drift": 0.5},
        ]


@pytest.mark.parametrize(
    ("names", "summary"),
    [
        (["bn"], "bn"),
        (["layer1.0.bn1", "layer1.1.bn1", "layer1.2.bn1"], "layer1.*.bn1 (3)"),
        (["layer1.0.bn1", "layer1.1.bn1"], "layer1.{0,1}.bn1 (2)"),
        (["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.bn1"], "bn1, layer*.0.bn* (4)"),
        (["a.bn", "b.bn", "c.bn"], "a.bn, b.bn, ... (3)"),
    ],
)
def test_names_in_short(names, summary):
    """Numbers in which names differ are stars; names of another form stand beside them, two at most."""
    assert summarised(names) == summary


def test_a_report():
    """It is the plan's table under what was done."""
    plan = planned([Site("bn1", "BatchNorm2d", 8), Site("bn2", "BatchNorm2d", 8)], exclude=["bn2"])
    report = Report(None, plan, lambda: None, lambda example: [])
    drift = plan.decisions[0].drift

    assert report.summary == "1 replaced, 0 already patched, 1 skipped"
    assert str(report).splitlines() == [
        "1 replaced, 0 already patched, 1 skipped",
        "name  type         C  becomes      drift  folds  note",
        "----------------------------------------------------------",
        f"bn1   BatchNorm2d  8  gn groups=2  {drift:.2f}   no",
        "bn2   BatchNorm2d  8  (left)                     excluded",
        "drift: expected change of the layer's output, as a share of its root mean square",
    ]


def test_a_plan_for_nothing():
    """A model without BatchNorms has a plan without rows."""
    assert str(planned([])) == "plan for 0 BatchNorms"
