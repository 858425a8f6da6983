"""Does every way to end a program end well, again and again, on several versions of Python?

It runs the modes of tests/support/exits.py and prints, for each mode and each Python, how many ended without a fault
and the longest time from the end of the program's own code to the end of its process.

    python scripts/probes/exit_matrix.py --times 20
    python scripts/probes/exit_matrix.py --times 5 --python .venv-test-312/bin/python .venv-test-313/bin/python
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support import exits


def version(python: str) -> str:
    """Return the version of an interpreter."""
    return subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout.split()[1]


def repeated(name: str, times: int, python: str, root: Path) -> tuple[list[list[str]], float]:
    """Run one mode; return the faults of each run that had some, and the longest time to the end in seconds."""
    model, cache = root / "model", root / f"cache-{version(python)}"
    folders = [
        root / version(python) / name.replace(" ", "_").replace(",", "") / str(number) for number in range(times)
    ]
    # Two at a time: each begins with seconds of imports.
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda folder: exits.run(name, folder, model, cache, python), folders))
    faults = [exits.faults(name, folder, outcome) for folder, outcome in zip(folders, outcomes, strict=True)]
    return [found for found in faults if found], max(outcome.seconds or 0.0 for outcome in outcomes)


def main() -> None:
    """Run the matrix; exit with 1 if any run had a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="runs of each mode on each Python")
    parser.add_argument("--modes", nargs="*", default=list(exits.MODES), help="names of tests/support/exits.py")
    parser.add_argument(
        "--python",
        nargs="*",
        type=os.path.abspath,  # each program runs in a folder of its own
        default=[sys.executable],
        help="interpreters with jax_client installed",
    )
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(prefix="exits-") as folder:
        root = Path(folder)
        exits.write_model(root / "model")
        for python in args.python:
            for name in args.modes:
                faults, slowest_s = repeated(name, args.times, python, root)
                good = args.times - len(faults)
                print(f"{version(python):8} {good:3} of {args.times}  {slowest_s:5.1f} s  {name}", flush=True)
                for found in faults:
                    failed = True
                    print("    " + "; ".join(found), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
