"""What did reinforcement learning do over several seeds? Draw what `rl.py --log` wrote, one file per seed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from showing import smoothed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("logs", type=Path, nargs="+", help="JSON lines, one file per seed")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    runs = [[json.loads(line) for line in log.read_text().splitlines()] for log in args.logs]
    figure, (rewards, divergence) = plt.subplots(2, 1, figsize=(6, 5), sharex=True, height_ratios=(3, 1))
    for run in runs:
        steps = [row["step"] for row in run]
        rewards.plot(steps, [row["reward"] for row in run], color="tab:blue", alpha=0.35, linewidth=1)
        divergence.plot(steps, [row.get("trainer_sampler_kl", 0.0) for row in run], color="tab:gray", linewidth=1)
    shared = min(map(len, runs))
    mean = [fmean(run[i]["reward"] for run in runs) for i in range(shared)]
    label = f"mean of {len(runs)} seeds, smoothed"
    rewards.plot(range(1, shared + 1), smoothed(mean, 0.6), color="tab:blue", linewidth=2, label=label)
    rewards.set(ylabel="mean reward of a round", ylim=(0, 1), title=args.title)
    rewards.legend(loc="lower right", frameon=False)
    divergence.set(xlabel="round", ylabel="trainer/sampler KL\nper token, nats", yscale="log")
    figure.tight_layout()
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
