"""What does the server stand: many samples, many clients, slow clients, a full queue; and what does HTTP itself cost?

Run it on idle cores. The server has a process of its own, the load comes from this one. Each figure is printed beside
its bar; the exit code is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from bench_rows import machine
from load.load_clients import clients, samples, slow, watched
from load.load_http import full, pairs, passes
from load.load_process import Report

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


PARTS: dict[str, Callable[[argparse.Namespace, Report], None]] = {
    "pairs": pairs,
    "passes": passes,
    "samples": samples,
    "clients": clients,
    "slow": slow,
    "watched": watched,
    "full": full,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--model", default=MODEL, help="what the server trains and samples")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--vocabulary", type=int, default=49_000, help="token ids are below it")
    parser.add_argument(
        "--length", type=int, default=64, help="tokens of a sequence of the parts clients, slow and watched"
    )
    parser.add_argument("--pairs", type=int, default=20_000, help="asample + retrieve pairs of the part pairs")
    parser.add_argument("--connections", type=int, default=64, help="of the part pairs")
    parser.add_argument("--batch", type=int, nargs=2, default=(64, 512), help="sequences and tokens of the part passes")
    parser.add_argument("--passes", type=int, default=3, help="forward_backward calls of the part passes")
    parser.add_argument("--samples", type=int, default=500, help="concurrent samples of the part samples")
    parser.add_argument("--p99", type=float, default=120.0, help="bar of the part samples, s")
    parser.add_argument("--clients", type=int, default=8, help="of the part clients")
    parser.add_argument("--steps", type=int, default=12, help="of each client of the part clients")
    parser.add_argument("--slow-seconds", type=float, default=30.0, help="how long the slow clients send")
    parser.add_argument("--rounds", type=int, default=25, help="of the part watched, 12 steps each")
    parser.add_argument("--flood", type=int, default=10_000, help="requests that fill the queue")
    parser.add_argument("--json", type=Path, help="write conditions and every figure")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    conditions = machine()
    print(json.dumps(conditions), flush=True)
    report = Report()
    for name in args.parts:
        PARTS[name](args, report)
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions, "rows": report.rows}, indent=1) + "\n")
    return int(not all(row["met"] for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
