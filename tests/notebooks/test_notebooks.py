"""Are the notebooks what their sources say, and does each run from its first cell to its last, as Jupyter runs it?

The one of the quickstart runs in CI too, where only the wheel is installed: scripts/ci_smoke.py.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "docs" / "notebooks"
# How far each goes here: its optimizer steps, epochs or rounds.
STEPS = {
    "quickstart": 2,
    "your_own_data": 1,
    "verifiable_reward": 1,
    "custom_loss": 2,
    "distillation": 1,
    "serve": 2,
}


def made() -> dict[Path, str]:
    spec = importlib.util.spec_from_file_location("make_notebooks", ROOT / "scripts" / "make_notebooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.written()


def test_the_notebooks_are_made_from_their_sources() -> None:
    expected = made()
    assert {path.stem for path in expected} == set(STEPS)
    assert {path: path.read_text(encoding="utf-8") for path in sorted(NOTEBOOKS.glob("*.ipynb"))} == expected, (
        "run: python scripts/make_notebooks.py"
    )


@pytest.mark.full
@pytest.mark.real
@pytest.mark.torch
@pytest.mark.parametrize("name", STEPS)
def test_a_notebook_runs_to_its_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    notebook.metadata.kernelspec.name = _kernel(tmp_path, monkeypatch)
    monkeypatch.setenv("STEPS", str(STEPS[name]))
    monkeypatch.setenv("JAX_CLIENT_HOME", str(tmp_path / "state"))
    client = nbclient.NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code" and cell.source)


def _kernel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a kernel of this very Python, whatever kernels the user has; return its name."""
    directory = folder / "kernels" / "tested"
    directory.mkdir(parents=True)
    command = f'["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"]'
    (directory / "kernel.json").write_text(f'{{"argv": {command}, "display_name": "tested", "language": "python"}}')
    monkeypatch.setenv("JUPYTER_PATH", str(folder))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    # The state of the kernel's own files, such as its connection, belongs to the test.
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return "tested"
