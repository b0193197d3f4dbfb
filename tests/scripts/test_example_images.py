"""Example images from packages: a made-up package of emoji; digits where scikit-learn is installed."""

import json
from pathlib import Path

import pytest
from PIL import Image

from scripts import example_images
from utils.errors import InputError


def test_emoji(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gem = tmp_path / "usr/share/rubygems-integration/all/gems/gemojione-3.3.0"
    (gem / "assets/png").mkdir(parents=True)
    (gem / "config").mkdir()
    entries = {"fish": ("1f41f", "nature"), "pear": ("1f350", "food"), "star": ("2b50", "extras")}
    index = {name: {"unicode": code, "category": category} for name, (code, category) in entries.items()}
    (gem / "config/index.json").write_text(json.dumps(index))
    for code, _ in entries.values():
        Image.new("RGBA", (64, 64)).save(gem / f"assets/png/{code.upper()}.png")
    arguments = ["emoji", str(tmp_path / "emoji"), "--source", str(tmp_path)]
    example_images.main(arguments)
    found = sorted(str(path.relative_to(tmp_path / "emoji")) for path in (tmp_path / "emoji").glob("*/*"))
    assert found == ["food/1F350.png", "nature/1F41F.png"]
    example_images.main(arguments)
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / 'emoji'}: exists already"


def test_without_the_package(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found no gemojione-\*, expected Debian's package ruby-gemojione"):
        example_images.main(["emoji", str(tmp_path / "emoji"), "--source", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    example_images.main(["digits", str(tmp_path / "digits")])
    assert len(list((tmp_path / "digits").glob("*/*.png"))) == 1797
    assert {Image.open(path).size for path in (tmp_path / "digits/3").iterdir()} == {(32, 32)}
