"""The notebook of docs/examples runs from top to bottom, on a tiny run instead of the quick start's."""

import math
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nbclient import NotebookClient

from modeling.loading import load_pretrained
from modeling.rear import ReAR
from tests.docs.pages import ROOT
from utils.config import load_config, save_config
from utils.files.weights import save_weights
from utils.images import to_float

NOTEBOOK = ROOT / "docs/examples/first_look.ipynb"


@pytest.fixture
def quickstart(tiny_config_file: Path, tmp_path: Path) -> Path:
    """The part of a quick start that the notebook needs: a run and validation images."""
    config = load_config([f"config={tiny_config_file}", f"experiment.output_dir={tmp_path / 'rear'}"])
    (tmp_path / "rear").mkdir()
    save_config(config, tmp_path / "rear/config.yaml")
    torch.manual_seed(0)
    save_weights(ReAR(config.model).state_dict(), tmp_path / "rear/model.safetensors")
    (tmp_path / "tokenizer").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "tokenizer/reference.npz", arr_0=images, arr_1=np.arange(7) % 5)
    return tmp_path


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_notebook_runs(quickstart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "QUICKSTART"):
        monkeypatch.setenv(name, str(quickstart))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}  # where editors start it
    NotebookClient(notebook, timeout=90, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5

    model, tokenizer = load_pretrained(quickstart / "first_look")
    stored = np.load(quickstart / "tokenizer/reference.npz")
    with torch.no_grad():
        codes = tokenizer.encode(to_float(torch.from_numpy(stored["arr_0"])))
        logits = model(codes, torch.from_numpy(stored["arr_1"])).logits
    expected = F.cross_entropy(logits.flatten(0, 1), codes.flatten()).item()
    printed = "".join(output.get("text", "") for output in outputs)
    loss, uniform = map(float, re.search(r"^(\S+) nats per code; ln V is (\S+)$", printed, re.MULTILINE).groups())
    assert loss == pytest.approx(expected, abs=1e-3)
    assert uniform == pytest.approx(math.log(24), abs=1e-3)


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 8
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
