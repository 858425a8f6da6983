"""Does the installed wheel hold what git holds, and teach the quickstart? Run outside the tree: ci_smoke.py ROOT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "notebooks" / "quickstart.ipynb"
STEPS = 4
# Where the wheel puts the tree's folders: see [tool.setuptools.package-dir].
FOLDERS = {"models/": "jax_client/models/", "losses/": "jax_client/losses/", "jax_client/": "jax_client/"}


def check_files(root: Path) -> None:
    """Compare the wheel's file list with git's."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    # A README at the door of a room is for who reads the repository.
    listed = [name for name in listed if not name.endswith(".md")]
    known = {
        target + name[len(source) :] for source, target in FOLDERS.items() for name in listed if name.startswith(source)
    }
    files = {str(file) for file in metadata.files("jax_client") or [] if file.suffix != ".pyc"}
    packed = {file for file in files if file.startswith("jax_client/")}
    if known != packed:
        sys.exit(f"In git and not in the wheel: {sorted(known - packed)}; the other way: {sorted(packed - known)}.")
    print(f"the wheel holds git's {len(known)} files")


def check_quickstart() -> None:
    """Run the notebook of the quickstart, whose last cell fails unless the loss has fallen."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # A kernel of this very environment, whatever kernels the user has.
        kernel = Path(folder) / "kernels" / "smoke"
        kernel.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        about = {"argv": argv, "display_name": "smoke", "language": "python"}
        (kernel / "kernel.json").write_text(json.dumps(about))
        os.environ |= {"JUPYTER_PATH": folder, "IPYTHONDIR": f"{folder}/ipython", "STEPS": str(STEPS)}
        notebook.metadata.kernelspec.name = "smoke"
        resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
        nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    printed = [output["text"] for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output]
    print(f"{NOTEBOOK.name} ran to its end:", "".join(printed).strip(), sep="\n")


if __name__ == "__main__":
    check_files(Path(sys.argv[1]))
    check_quickstart()
