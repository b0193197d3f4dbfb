"""`training.profile` and `training.deterministic` in a run."""

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch

from evaluation import validator
from scripts import train_rear
from utils.config import load_config, save_config
from utils.distributed import DistributedContext
from utils.errors import InputError
from utils.run.profiling import profiled


def events(folder: Path) -> list[dict]:
    with gzip.open(folder / "profile/trace.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


def steps_of(folder: Path) -> list[str]:
    return sorted({event["name"] for event in events(folder) if event["name"].startswith("step ")})


@pytest.mark.parametrize(
    ("profile", "begin", "last", "steps"),
    [
        ("3:5", 0, 9, ["step 3", "step 4"]),
        ("0:1", 0, 9, ["step 0"]),
        ("3:7", 5, 9, ["step 5", "step 6"]),  # a run that goes on
        ("3:7", 0, 4, ["step 3", "step 4"]),  # one that is stopped
        ("8:12", 0, 9, ["step 8", "step 9"]),  # one that is done
    ],
)
def test_the_trace_holds_its_steps(tmp_path: Path, profile: str, begin: int, last: int, steps: list[str]) -> None:
    config = load_config([f"experiment.output_dir={tmp_path}", f"training.profile={profile}"])
    numbers, seen = (
        profiled(range(begin, 10), config, DistributedContext(0, 1, torch.device("cpu")), logging.getLogger()),
        [],
    )
    for number in numbers:
        seen.append(number)
        torch.ones(1).relu()
        if number == last < 9:
            break
    numbers.close()
    assert seen == list(range(begin, last + 1))
    assert steps_of(tmp_path) == steps
    assert sum(event["name"] == "aten::relu" for event in events(tmp_path)) == len(steps)


@pytest.mark.parametrize(("profile", "rank"), [("20:30", 0), ("3:5", 1), ("null", 0)])
def test_nothing_is_written_without_such_a_step_or_on_another_rank(tmp_path: Path, profile: str, rank: int) -> None:
    config = load_config([f"experiment.output_dir={tmp_path}", f"training.profile={profile}"])
    assert list(profiled(range(10), config, DistributedContext(rank, 2, torch.device("cpu")), logging.getLogger())) == [
        *range(10)
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("profile", ["5", "5:", "5:5", "6:5", "a:b", "1:2:3", "-1:3", ":"])
def test_what_is_no_range_of_steps_is_named(profile: str) -> None:
    with pytest.raises(InputError, match=rf"^training\.profile={profile}: expected START:STOP"):
        load_config(["experiment.output_dir=unused", f"training.profile={profile}"])


def test_a_saved_config_is_read_alike(tmp_path: Path) -> None:
    config = load_config(["experiment.output_dir=unused", "training.profile=10:13"])  # in YAML a number to base 60
    save_config(config, tmp_path / "config.yaml")
    assert load_config([f"config={tmp_path / 'config.yaml'}"]) == config


def test_a_run_is_profiled_and_deterministic(
    tiny_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def watch(module: object, name: str) -> None:
        original = getattr(module, name)

        def watched(*arguments: object, **options: object) -> object:
            modes.append((name, torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic))
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, watched)

    watch(train_rear, "training_step")
    watch(validator, "make_grid")
    more = ["training.max_train_steps=4", "experiment.generate_every=4", "training.profile=1:3"]
    folders = {mode: tmp_path / mode for mode in ("false", "true")}
    for mode, folder in folders.items():
        arguments = [f"experiment.output_dir={folder}", f"training.deterministic={mode}"]
        assert train_rear.main(load_config([*tiny_arguments, *more, *arguments])) == "completed"
        assert not torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.deterministic
        assert steps_of(folder) == ["step 1", "step 2"]
        assert "aten::linear" in {event["name"] for event in events(folder)}
    assert modes == [
        *[("training_step", False, False)] * 4 + [("make_grid", False, False)],
        *[("training_step", True, True)] * 4 + [("make_grid", True, True)],
    ]
    grids = [(folder / "train_generated_images/0000004.png").read_bytes() for folder in folders.values()]
    assert grids[0] == grids[1]
