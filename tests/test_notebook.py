"""The example notebook runs from its first cell to its last, and shows what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
NOTEBOOK = Path(__file__).parents[1] / "docs" / "examples" / "first_steps.ipynb"


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "src"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # what it shows is made where it is read
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = "".join(out.get("text", "") for cell in cells for out in cell.outputs)
    losses = [float(number) for number in re.findall(r"loss (\d+\.\d+)", printed)]
    assert losses[-1] < 0.75 * losses[0]
    shown = [out["data"] for cell in cells for out in cell.outputs if "data" in out]
    grids = [data for data in shown if "image/png" in data]
    first, between = (data["text/plain"] for data in grids)
    assert first.startswith("Samples(6 images of 32 x 32 pixels: red circle, green square, blue triangle; seeds 0 to 5")
    assert between.startswith("Samples(5 images of 32 x 32 pixels: red circle to blue circle at 0,")
    assert all(data["text/html"].count("<figure") == number for data, number in zip(grids, (6, 5), strict=True))
    bars = [data["text/html"] for data in shown if "<progress" in data.get("text/html", "")]
    assert [re.search(r"drawing \d/\d images", bar)[0] for bar in bars] == ["drawing 6/6 images", "drawing 5/5 images"]
    assert len(list(tmp_path.glob("first_steps/*.png"))) == 6
