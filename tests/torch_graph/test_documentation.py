"""Does docs/server.md list the operations that an uploaded loss may call?"""

from __future__ import annotations

from pathlib import Path

from jax_client.torch_graph.ops import OPERATIONS


def documented() -> list[str]:
    """The operations as docs/server.md lists them: under the names that a user writes."""
    written = {"torch._C._special.special_": "torch.special.", "torch._C._linalg.linalg_": "torch.linalg."}
    written |= {"torch._C._nn.log_sigmoid": "F.logsigmoid", "torch._C._nn.": "F.", "torch.nn.functional.": "F."}
    written |= {"torch.functional.": "torch."}
    names = set()
    for name in OPERATIONS:
        start = next((start for start in written if name.startswith(start)), "")
        names.add(written.get(start, "") + name.removeprefix(start))

    def of(start: str) -> set[str]:
        found = {name.removeprefix(start) for name in names if name.startswith(start)}
        return {name for name in found if "." not in name}

    functions, methods = of("torch."), of(".")
    groups = {
        "Functions of `torch` and methods of tensors": functions & methods,
        "Functions of `torch`": functions - methods,
        "Methods": methods - functions,
        "`torch.nn.functional`": of("F."),
        "`torch.special`": of("torch.special."),
        "`torch.linalg`": of("torch.linalg."),
        "`math`, of numbers": of("math."),
        "`operator`, which Python's own operators and indexing become": of("operator."),
    }
    return [f"- {head}: {', '.join(f'`{name}`' for name in sorted(found))}." for head, found in groups.items()]


def test_the_documentation_lists_the_table() -> None:
    text = " ".join((Path(__file__).parents[2] / "docs" / "server.md").read_text().split())
    for line in documented():
        assert line in text, line
