"""The examples in docs/examples run as typed in their first comment."""

import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

EXAMPLES = [ROOT / "docs/examples/plain_gpt.py", ROOT / "docs/examples/llama.py"]


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_loss_of_another_code_base_falls(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) < 60
    words = shlex.split(lines[0].removeprefix("# "))
    assert words == ["python", str(path.relative_to(ROOT))]
    result = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    losses, of_codes = (
        [float(number) for number in re.findall(rf"  {name} (\S+)", result.stdout)]
        for name in ("loss", "cross-entropy")
    )
    assert len(losses) > 5
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 2  # both terms of the regularization fall towards -1 each
    assert losses[-1] < of_codes[-1] - 1
    assert of_codes[-1] < of_codes[0] / 4
