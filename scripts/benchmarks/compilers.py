"""What does XLA's compiler say of the programs for devices that are not here, beside `jax_client estimate`?

    pip install 'jax_client[aot]'
    python scripts/benchmarks/compilers.py                    # every case; an hour of a core
    python scripts/benchmarks/compilers.py v5e-8 --json out   # those of a machine

It prints the table of docs/benchmarks.md: memory of one device in MiB. No times: nothing runs.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from jax_client.engine.train.limits import OVERHEAD
from jax_client.errors import RequestFailedError
from jax_client.estimate.chips import parse_machine
from jax_client.estimate.compile import compile_programs
from jax_client.estimate.plan import Estimate, Question, estimate
from jax_client.models.config import ModelConfig

MIB = 2**20
WIDTHS = {
    "4B": {"d_model": 2560, "d_ff": 9728, "tied_embeddings": True, "n_layers": 36},
    "8B": {"d_model": 4096, "d_ff": 12288, "tied_embeddings": False, "n_layers": 36},
}
TRAIN, SAMPLE = ("forward", "backward"), ("decode", "prefill")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Programs of a model's widths on a machine.

    Attributes:
        widths: of which model.
        remat: what training keeps.
        rows, length: of a micro-batch, per way.
        layers: None is as many as the model has.
    """

    machine: str
    mesh: dict[str, int] = field(default_factory=dict)
    widths: Literal["4B", "8B"] = "8B"
    programs: tuple[str, ...] = (*TRAIN, "optim_step", *SAMPLE)
    remat: Literal["none", "selective", "full"] = "full"
    rows: int = 2
    length: int = 4096
    layers: int | None = 2

    def estimated(self) -> Estimate:
        """Return what the package expects."""
        sizes = WIDTHS[self.widths] | ({} if self.layers is None else {"n_layers": self.layers})
        model = ModelConfig(
            family="qwen3",
            norm_eps=1e-6,
            rope_theta=1e6,
            qk_norm=True,
            max_context=4096,
            vocab_size=151936,
            head_dim=128,
            n_kv_heads=8,
            n_heads=32,
            **sizes,  # type: ignore[arg-type]
        )
        machine = parse_machine(self.machine)
        ways = self.mesh.get("data", 1) * self.mesh.get("fsdp", 1)
        question = Question(
            model=model,
            machine=machine,
            mesh=self.mesh or "auto",
            rows=self.rows * ways,
            length=self.length,
            sampled_rows=16 * ways,
            max_tokens=self.rows * (self.length + OVERHEAD),
            remat=self.remat,
        )
        return estimate(question)

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        layers = f"{WIDTHS[self.widths]['n_layers'] if self.layers is None else self.layers} layers"
        rows = f"{self.rows} x {self.length:,} tokens, {self.remat}"
        return ", ".join(filter(None, [self.machine, mesh, f"{self.widths}, {layers}", rows]))


EIGHT: tuple[dict[str, int], ...] = ({"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"tensor": 8})
CASES = (
    *(Case(machine=machine, mesh=mesh) for machine in ("v5e-8", "v6e-8", "h100-8") for mesh in EIGHT),
    Case(machine="v5e-8", mesh={"fsdp": 8}, programs=TRAIN, remat="none", rows=1, length=2048),
    Case(machine="v5e-8", mesh={"fsdp": 8}, programs=TRAIN, remat="selective", rows=1, length=2048),
    Case(machine="v5e-8", mesh={"fsdp": 8}, programs=TRAIN, rows=1, length=2048),
    Case(machine="v5p-8", mesh={"fsdp": 4}),
    Case(machine="v5p-8", mesh={"fsdp": 4}, programs=TRAIN, remat="selective"),
    Case(machine="v5e-1", widths="4B", rows=1, length=2048),
    Case(machine="v5e-1", widths="4B", programs=TRAIN, remat="none", rows=1, length=2048),
    *(Case(machine="h100", remat=remat, programs=TRAIN) for remat in ("none", "selective", "full")),
    Case(machine="h100", widths="4B", programs=SAMPLE),
    Case(machine="v5e-8", mesh={"fsdp": 8}, layers=None, rows=1),
)


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machines", nargs="*", help="all, if none is named")
    parser.add_argument("--json", type=Path, help="write the compilers' whole accounts here")
    args = parser.parse_args()
    print(", ".join(filter(None, map(_version, ("jaxlib", "libtpu", "jax-cuda13-pjrt")))), "\n")
    print("| devices, mesh, widths, micro-batch of a way | program | CPU s | arguments (padding) | temporaries |"
          " estimated | ratio | sent in a turn of the loops | copies |")  # fmt: skip
    print("|---|---|---:|---:|---:|---:|---:|---|---|", flush=True)
    found = []
    for case in CASES:
        if args.machines and case.machine not in args.machines:
            continue
        for account in accounts(case):
            found.append({"case": asdict(case)} | account)
            print(row(case, account), flush=True)
            if args.json is not None:
                args.json.write_text(json.dumps(found, indent=1))


def accounts(case: Case) -> Iterator[dict[str, Any]]:
    """Yield what the compiler says of each program; where it cannot be run, one error for all."""
    try:
        yield from compile_programs(case.estimated(), case.programs)
    except RequestFailedError as error:
        yield {"program": ", ".join(case.programs), "error": str(error)}


def row(case: Case, account: dict[str, Any]) -> str:
    """Return a program's row of the table."""
    if "error" in account:
        return f"| {case} | {account['program']} | {account['error'].splitlines()[0]} |"
    estimated, temporaries = account["estimated"], account["temporaries"]
    expected = ("", "") if estimated is None else (f"{estimated / MIB:,.0f}", f"{temporaries / estimated:.2f}")
    arguments = f"{account['arguments'] / MIB:,.0f} ({account['padding'] / account['arguments']:.2%})"
    sent: dict[str, float] = defaultdict(float)
    for each in account["collectives"]:
        if each["loops"]:
            sent[each["kind"]] += each["count"] * each["bytes"] / MIB
    shown = ", ".join(f"{kind} {size:.3g}" for kind, size in sent.items())
    cells = [case, account["program"], f"{account['cpu_seconds']:.0f}", arguments, f"{temporaries / MIB:,.0f}"]
    return "| " + " | ".join(map(str, [*cells, *expected, shown, "; ".join(account["copies"])])) + " |"


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
