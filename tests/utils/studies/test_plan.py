"""Plans: what they resolve to, what is refused, what counts as a change."""

import json
from pathlib import Path

import pytest

from evaluation.report import TITLES
from tests.utils.studies.stub_study import StubStudy
from utils.config import ROOT
from utils.errors import InputError
from utils.studies.cells import cells_of
from utils.studies.plan import METRICS, Plan, read_plan

TINY = ROOT / "configs/studies/tiny.yaml"


@pytest.fixture
def study(tiny_config_file: Path, tmp_path: Path) -> StubStudy:
    return StubStudy(tiny_config_file, tmp_path)


def read(study: StubStudy, *more: str) -> Plan:
    return read_plan(study.words(*more))[0]


def test_an_arm_is_the_base_with_its_overrides(study: StubStudy) -> None:
    study.plan["overrides"] = {"training": {"max_train_steps": 9}, "optimizer.name": "muon"}
    study.plan["arms"]["rear"] = {"training.max_train_steps": 7, "model.vq_model.channel_mult": [1, 1, 2]}
    plan = read(study, "optimizer.name=adamw", "n=10")
    assert [config.training.max_train_steps for config in plan.configs.values()] == [9, 7]
    assert plan.configs["ar"].model.generator.perturb_mode == "none"
    assert plan.configs["rear"].model.generator.perturb_mode == "switch"
    assert {config.optimizer.name for config in plan.configs.values()} == {"adamw"}  # the command line wins
    assert {config.sampling.num_fid_samples for config in plan.configs.values()} == {10}


def test_commands_of_a_cell(study: StubStudy) -> None:
    study.plan |= {"stages": ["train", "sample", "evaluate", "sweep"], "guidance_scales": [1, 1.5]}
    plan = read(study)
    cell = next(cell for cell in cells_of(plan) if cell.name == "rear/seed2")
    train, sample, evaluate, sweep = ([str(word) for word in cell.command(stage)] for stage in plan.file.stages)
    folder = study.folder / "rear/seed2"
    assert train[1].endswith("scripts/train_rear.py")
    assert {"training.seed=2", "sampling.seed=2", f"experiment.output_dir={folder / 'run'}"} <= {*train}
    assert {"experiment.group=stub/rear", 'experiment.tags=["stub", "rear"]', "experiment.name=stub/rear/seed2"} <= {
        *train
    }
    weights = f"experiment.generator_checkpoint={folder / 'run'}"
    assert {weights, "sampling.seed=2", f"experiment.output_dir={folder / 'samples'}"} <= {*sample}
    assert evaluate[2:] == [study.plan["reference"], str(folder / "samples.npz"), "--backend", "efficientnet_lite0"]
    assert {weights, "sweep.guidance_scale=[1.0, 1.5]", f"sweep.reference={study.plan['reference']}"} <= {*sweep}


def test_the_report_of_a_timm_model(study: StubStudy) -> None:
    study.plan["backend"] = "timm:vit_tiny.tag:weights.pt"
    cell = cells_of(read(study))[0]
    cell.folder.mkdir(parents=True)
    with pytest.raises(InputError, match=r"samples\.timm-vit_tiny\.tag-\*\.json: found 0 reports, expected 1"):
        cell.report_path()
    (cell.folder / "samples.timm-vit_tiny.tag-0123abcd.json").write_text("{}")
    assert cell.report_path().name == "samples.timm-vit_tiny.tag-0123abcd.json"


def test_identical_arms_have_one_config(study: StubStudy) -> None:
    study.plan["arms"] = {"a": {}, "b": {}, "c": {"training.max_train_steps": 3}}
    study.plan["hypotheses"] = {}
    hashes = read(study).config_sha256
    assert hashes["a"] == hashes["b"] != hashes["c"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1]}, r"seeds: Expected `array` of length >= 2"),
        ({"seeds": [1, 2, 1]}, "seeds: found 1 twice"),
        ({"arms": {"../x": {}}}, "arms"),
        (
            {"hypotheses": {"H1": {"arm": "raer", "baseline": "ar"}}},
            r"hypotheses\.H1: found no arm 'raer'; did you mean",
        ),
        ({"hypotheses": {"H1": {"arm": "ar", "baseline": "ar"}}}, r"hypotheses\.H1: arm and baseline are both ar"),
        ({"backend": "inceptoin"}, "backend: Expected `str` matching regex"),
        ({"metric": "frechet_distanse"}, "metric=frechet_distanse: expected frechet_distance, .*did you mean"),
        ({"metric": "val/ar_loss"}, "arm ar: metric=val/ar_loss needs experiment.eval_every above 0"),
        ({"reference": "absent.npz"}, "reference=absent.npz: no such file"),
        ({"reference": None}, "reference: missing value; the stage evaluate needs it"),
        ({"n": None}, "n: missing value; the stage sample needs it"),
        ({"stages": ["train", "evaluate"]}, "stages: found evaluate, expected sample before it"),
        ({"stages": ["train", "train"]}, "stages: found train twice"),
        ({"stages": ["train", "score"]}, r"stages\[1\]: Invalid enum value 'score'"),
        ({"guidance_scales": [1]}, "guidance_scales=.*: none of the stages .* reads it"),
        ({"arms": {"ar": {"training.seed": 3}, "rear": {}}}, r"arms\.ar: found training\.seed, which the study sets"),
        ({"overrides": {"sampling.num_fid_samples": 3}}, "overrides: found sampling.num_fid_samples"),
        ({"arms": {"ar": {"training.sead": 3}, "rear": {}}}, "arm ar: command line: unknown key 'training.sead'"),
        ({"arms": {"ar": {"model.generator.dropout": 2}, "rear": {}}}, r"arm ar: .*dropout=2: expected"),
        ({"margin_pct": 0}, "margin_pct: Expected `float` > 0"),
        ({"seed": [1, 2]}, "Object contains unknown field `seed`"),
    ],
)
def test_a_wrong_plan_is_one_line(study: StubStudy, change: dict, message: str) -> None:
    study.plan |= change
    study.plan = {key: value for key, value in study.plan.items() if value is not None}
    with pytest.raises(InputError, match=rf"stub\.yaml: .*{message}") as error:
        read(study)
    assert "\n" not in str(error.value)
    assert not study.folder.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "config=: no such file; give the YAML file of a plan"),
        (["config=absent.yaml"], "config=absent.yaml: no such file"),
        (["status"], "command line: 'status' is not of the form key=value"),
        ([f"config={TINY}", "seeds=[1, 2"], r"seeds, line 1: expected ',' or '\]'"),
    ],
)
def test_a_wrong_command_line(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_plan(words)


def test_a_changed_plan_is_refused_and_the_change_named(study: StubStudy) -> None:
    with pytest.raises(InputError, match=r"plan\.json: No such file"):
        read(study).check_stored()
    assert not study.folder.exists()
    first = read(study).store()
    assert first == read(study).store() == json.loads((study.folder / "plan.json").read_text())["sha256"]
    for change, message in (
        ({"seeds": [1, 2, 3]}, r"seeds: found \[1, 2\], expected \[1, 2, 3\]"),
        ({"margin_pct": 5}, r"margin_pct: found 3\.0, expected 5\.0"),
        ({"arms": {**study.plan["arms"], "third": {}}}, r"arms: found \['ar', 'rear'\], expected .*'third'\]; restore"),
        ({"overrides": {"training.max_train_steps": 9}}, r"arm ar: training\.max_train_steps: found 40, expected 9"),
    ):
        before = dict(study.plan)
        study.plan |= change
        with pytest.raises(InputError, match=rf"plan\.json: the plan has changed since the first cell: .*{message}"):
            read(study).store()
        study.plan = before
    base = Path(study.plan["base"])
    study.plan["base"] = str(study.root / "base.yaml")
    Path(study.plan["base"]).write_text(base.read_text().replace("dropout: 0.1", "dropout: 0.2", 1))
    with pytest.raises(InputError, match=r"arm ar: model\.generator\.dropout: found 0\.1, expected 0\.2"):
        read(study).store()


def test_another_reference_is_a_change(study: StubStudy) -> None:
    read(study).store()
    Path(study.plan["reference"]).write_bytes(b"other images")
    with pytest.raises(InputError, match="sha256 of reference: found"):
        read(study).store()


def test_what_changes_no_number_is_no_change(study: StubStudy) -> None:
    first = read(study).store()
    copy = study.root / "copy.npz"
    copy.write_bytes(Path(study.plan["reference"]).read_bytes())
    study.plan["reference"] = str(copy)
    assert read(study).store() == first


def test_metrics_are_those_of_the_evaluator() -> None:
    found = {name for names in METRICS.values() for name in names}
    assert found == {name for name in TITLES if not name.startswith(("kid", "kernel_distance"))}


PREPARATORY = ("fashion_learning_rate", "rear_pilot")  # they choose a setting, and test nothing


def test_the_shipped_plans_are_right(tmp_path: Path) -> None:
    reference = tmp_path / "reference.npz"
    reference.write_bytes(b"")
    for path in sorted(TINY.parent.glob("*.yaml")):
        has_reference = "\nreference:" in path.read_text()
        plan, _ = read_plan([f"config={path}", *([f"reference={reference}"] if has_reference else [])])
        assert plan.folder == Path("outputs/studies") / path.stem
        assert bool(plan.file.hypotheses) == (path.stem not in PREPARATORY)
