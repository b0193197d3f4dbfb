import weakref

import pytest
import torch

from modeling.sampling.step_graph import StepGraphs


class Graph:
    """In place of a CUDA graph."""


def test_graphs_are_dropped_when_the_device_has_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(f"wait for {device}"))
    graphs = StepGraphs.__new__(StepGraphs)
    graphs.device, graphs.graphs = 1, {32: Graph()}
    weakref.finalize(graphs.graphs[32], calls.append, "drop")
    del graphs
    assert calls == ["wait for 1", "drop"]
