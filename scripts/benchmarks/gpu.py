"""What does an NVIDIA card make of this package? Ten minutes, one command: numbers, kernels, training, decoding, torch.

    python scripts/benchmarks/gpu.py --out DIR              # on the card
    python scripts/benchmarks/gpu.py --out DIR --tiny       # a rehearsal with a toy on a CPU, two minutes

The phases run one after the other, each in a child process with a time limit of its own. Every measurement is a JSON
line in DIR/rows.jsonl as soon as it is made. DIR/summary.txt has predictions beside measurements. It needs neither a
network nor `tinker` nor an installed package: the tree's folders are put together as the wheel would have them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from gpu_phases.predictions import table
from gpu_phases.rows import Journal, read

ROOT = Path(__file__).resolve().parents[2]
# Phases in the order of their worth, with the most seconds of each. What one leaves, later ones may use.
LIMITS = {"facts": 45, "model": 90, "right": 120, "train": 170, "decode": 130, "torch": 90, "kernels": 45}
LEAST_S = 15.0  # a phase does not begin with less left
TINY_FACTOR = 4  # a CPU takes longer, even over a toy
LARGE_FILE = 12e9  # bytes: of the model, and some


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of what is measured")
    parser.add_argument("--phases", default=",".join(LIMITS), help="which (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=570, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a toy on a CPU; its figures mean nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.phases.split(",")) - set(LIMITS):
        parser.error(f"there is no phase {', '.join(sorted(unknown))}; there are {', '.join(LIMITS)}")
    return args


def workplace(tiny: bool) -> Path:
    """Return where the model, the put-together package and compiled programs are: in memory where there is room."""
    memory = Path("/dev/shm")
    roomy = not tiny and memory.is_dir() and shutil.disk_usage(memory).free > 3 * LARGE_FILE
    return (memory if roomy else Path(tempfile.gettempdir())) / f"jax_client_gpu{'_tiny' if tiny else ''}"


def child(args: argparse.Namespace) -> None:
    """Carry out one phase; only children import jax or torch."""
    from gpu_phases.models import QWEN3_4B, TOY, write

    journal = Journal(out=args.out, phase=args.child, began=args.began, until=args.until, tiny=args.tiny)
    config, model = TOY if args.tiny else QWEN3_4B, workplace(args.tiny) / "model"
    if args.child == "model":
        with journal.row("written") as row:
            start = time.perf_counter()
            size = write(model, config)
            row |= {"GB": size / 1e9, "seconds": time.perf_counter() - start}
        return
    if args.child == "torch":
        from gpu_phases.torch_side import torch_and_peft as phase
    elif args.child == "train":
        from gpu_phases.training import train as phase
    elif args.child == "decode":
        from gpu_phases.decoding import decode as phase
    else:
        from gpu_phases import device

        phase = {"facts": device.facts, "right": device.right, "kernels": device.kernels}[args.child]
    phase(journal, config, model)


def put_together(site: Path) -> None:
    """Lay the package out as its wheel does, without installing anything."""
    shutil.rmtree(site, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "jax_client", site / "jax_client", ignore=ignore)
    for name in ("models", "losses"):
        shutil.copytree(ROOT / name, site / "jax_client" / name, ignore=ignore)


def run_phase(args: argparse.Namespace, phase: str, began: float, seconds: float) -> None:
    """Run a phase in a child process, and end it at its limit with all that it has started."""
    place = workplace(args.tiny)
    environment = os.environ | {
        "PYTHONPATH": str(place / "site"),
        # Fails where there is no card, in place of measuring a CPU.
        "JAX_PLATFORMS": "cpu" if args.tiny else "cuda,cpu",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "--out", str(args.out), "--child", phase, "--began", str(began)]
    command += ["--until", str(time.time() + seconds - 2), *(["--tiny"] if args.tiny else [])]
    start, code = time.time(), f"killed after {seconds:.0f} s"
    with (args.out / "log.txt").open("ab") as log:
        log.write(f"\n===== {phase}\n".encode())
        log.flush()
        process = subprocess.Popen(command, env=environment, stderr=log, start_new_session=True)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    journal = Journal(out=args.out, phase=phase, began=began, until=time.time(), tiny=args.tiny)
    journal.write("ended", code=code, seconds=time.time() - start)


def main() -> int:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    if args.child:
        try:
            child(args)
        except BaseException as error:
            journal = Journal(out=args.out, phase=args.child, began=args.began, until=args.until, tiny=args.tiny)
            journal.write("phase", error=f"{type(error).__name__}: {error}"[:600])
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)  # a device's runtime and an engine's threads have nothing left to save
    began = time.time()
    put_together(workplace(args.tiny) / "site")
    phases = [phase for phase in LIMITS if phase in args.phases.split(",")]
    for phase in phases:
        left = began + args.budget - time.time()
        if left < LEAST_S:
            journal = Journal(out=args.out, phase=phase, began=began, until=0.0, tiny=args.tiny)
            journal.write("phase", skipped=f"{left:.0f} s left of {args.budget:.0f}")
            continue
        run_phase(args, phase, began, min(LIMITS[phase] * (TINY_FACTOR if args.tiny else 1), left))
    rows = read(args.out)
    summary = table(rows, phases, args.tiny)
    (args.out / "summary.txt").write_text(summary, encoding="utf-8")
    (args.out / "report.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n" + summary, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
