"""Does the installed wheel hold what git holds, and does it train? Run outside the tree: ci_smoke.py ROOT."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax_client
from jax_client import types

sys.path.insert(0, str(Path(__file__).parent / "examples"))
from chat_data import read_conversations, render

EXAMPLES = Path(__file__).parent / "examples"
STEPS = 5
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


def check_training() -> None:
    """Take five steps on the bundled model; the loss of the same batch has to fall."""
    client = (
        jax_client.ServiceClient()
        .create_lora_training_client(base_model="HuggingFaceTB/SmolLM2-135M-Instruct", rank=8, seed=0)
        .result()
    )
    conversations = read_conversations(EXAMPLES / "data" / "lighthouse_keeper.jsonl")[:4]
    data = [render(client.get_tokenizer(), messages).datum for messages in conversations]
    losses = []
    for _ in range(STEPS):
        fwdbwd = client.forward_backward(data, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        losses.append(fwdbwd.result().metrics["loss:sum"])
    print("loss:sum of five steps:", ", ".join(f"{loss:.1f}" for loss in losses))
    if not losses[-1] < losses[0]:
        sys.exit("The loss did not fall.")


if __name__ == "__main__":
    check_files(Path(sys.argv[1]))
    check_training()
