"""The stages of a run and its settings, which need no framework."""

import pytest

from normswap.errors import InputError
from normswap.finetune.run.settings import Settings
from normswap.finetune.run.stages import Stage, parse

from .helpers import exactly


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        ("all", 100, (False, [Stage("all", 0, 100)])),
        ("calibrate", 100, (True, [])),
        ("calibrate,norm,all", 100, (True, [Stage("norm", 0, 20), Stage("all", 20, 80)])),
        ("norm=30, all", 100, (False, [Stage("norm", 0, 30), Stage("all", 30, 70)])),
        ("norm,last:2,all=50", 100, (False, [Stage("norm", 0, 10), Stage("last:2", 10, 40), Stage("all", 50, 50)])),
        ("norm,all", 5, (False, [Stage("norm", 0, 1), Stage("all", 1, 4)])),
        ("norm,all", 4, (False, [Stage("all", 0, 4)])),
    ],
)
def test_stages(text, steps, expected):
    """`norm` takes a fifth before another stage, counts are kept, and all steps are given away."""
    assert parse(text, steps) == expected


@pytest.mark.parametrize("text", ["", "norm,calibrate", "layers", "all=", "all=x", "last:0", "calibrate=3,all"])
def test_other_text(text):
    """Anything else is refused with what there is."""
    message = (
        "expected stages out of norm, all and last:N, each with =STEPS or not, after calibrate or not, "
        f"received stages={text!r}"
    )
    with pytest.raises(InputError, match=exactly(message)):
        parse(text, 100)


@pytest.mark.parametrize(
    ("text", "sums"), [("norm=30,all=30", "30 + 30 = 60"), ("norm=100,all", "100 + 0 = 100"), ("all=0", "0 = 0")]
)
def test_steps_that_do_not_add_up(text, sums):
    """Counts have to come to the run's steps and leave some for every stage."""
    message = f"expected stages of one step or more that take 100 together, received stages={text!r}, which take {sums}"
    with pytest.raises(InputError, match=exactly(message)):
        parse(text, 100)


class TestSettings:
    def test_come_back_from_toml(self, tmp_path):
        """What is written with a run is read again, and what is recorded beside it is passed over."""
        settings = Settings(steps=7, stages="norm,all", ema=0.5, harden=True)
        (tmp_path / "run.toml").write_text(settings.to_toml({"data": "x.npz", "eval_data": None}))

        assert Settings.from_toml(tmp_path / "run.toml") == settings
        assert "eval_data" not in (tmp_path / "run.toml").read_text()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("steps = true", "expected an integer at steps in {file}, received True"),
            ('lr = "0.1"', "expected a number at lr in {file}, received '0.1'"),
            ("milestones = 1979-05-27", "expected a list at milestones in {file}, received datetime.date(1979, 5, 27)"),
            ("milestones = [0.5, [1]]", "expected a number at milestones[1] in {file}, received [1]"),
            (
                'optimizer = "rms"',
                "expected 'sgd', 'adam', 'adamw' or 'amsgrad' at optimizer in {file}, received 'rms'",
            ),
            ("steps = -1", "expected `steps` above 0, received steps=-1 (in {file})"),
            ("lr = nan", "expected `lr` above 0, received lr=nan (in {file})"),
            ("power = 2.0", "expected schedule='poly' for power, received schedule='cosine'; leave it out (in {file})"),
            ("steps = ", "expected TOML in {file}, received text that is not: Invalid value (at end of document)"),
            ("a = " + "[" * 9999, "expected TOML nested no deeper than 100 levels in {file}, received deeper"),
        ],
    )
    def test_of_a_file_with_other_kinds(self, tmp_path, text, message):
        """Each setting is read as declared, and told by its name where it is not."""
        file = tmp_path / "run.toml"
        file.write_text(text)
        with pytest.raises(InputError, match=exactly(message.format(file=file))):
            Settings.from_toml(file)

    def test_of_one_stage(self):
        """A stage trains what it names for its own steps, norms before others at a fifth of the rate."""
        settings = Settings(steps=10, stages="norm=4,all", batch_size=5)
        norm, everything = (settings.training(stage, 0.3) for stage in settings.plan()[1])

        assert (norm.train, norm.steps, norm.lr, norm.batch_size) == ("norm", 4, pytest.approx(0.06), 5)
        assert (everything.train, everything.steps, everything.lr) == ("all", 6, 0.3)
        alone = Settings(train="norm")
        assert alone.training(alone.plan()[1][0], 0.3).lr == 0.3

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"checkpoint_every": 0}, "expected `checkpoint_every` above 0, received checkpoint_every=0"),
            ({"calibration_size": 0}, "expected `calibration_size` above 0, received calibration_size=0"),
            ({"blend": 2.0}, "expected `blend` from 0 to 1, received blend=2.0"),
            ({"reestimate": -1}, "expected `reestimate` of at least 0, received reestimate=-1"),
            ({"teacher": "me"}, "expected `teacher` out of original, none, received 'me'"),
            ({"train": ["norm"]}, "expected `train` to be all, norm or last:N, received train=['norm']"),
            (
                {"stages": ["norm", "all"]},
                "expected stages out of norm, all and last:N, each with =STEPS or not, after calibrate or not, "
                "received stages=['norm', 'all']",
            ),
            (
                {"augment": ["flip"]},
                "expected `none`, or `flip` and one of `crop` and `resized-crop` joined by commas, received "
                "augment=['flip']",
            ),
            (
                {"stages": "norm,all", "train": "norm"},
                "expected one of `stages` and `train`, received stages='norm,all' and train='norm'",
            ),
            ({"limits": "wide"}, "expected `limits` out of paper, pretrained, sigmoid, received 'wide'"),
        ],
    )
    def test_values_out_of_range(self, changes, message):
        """A setting that cannot be is refused by name."""
        with pytest.raises(InputError, match=exactly(message)):
            Settings(**changes)
