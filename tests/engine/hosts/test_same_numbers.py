"""Do several hosts give the bits of one with as many devices? In training, custom losses, sampling, saves and loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.hosts.run import run_numbers

FAMILIES = [
    ("llama_tied", {"fsdp": 2, "tensor": 2}),
    ("qwen3_moe_mixed", {"expert": 2, "tensor": 2}),
    ("gpt_oss", {"data": 2, "fsdp": 2}),
    ("qwen3_5", {"fsdp": 2, "tensor": 2}),
]


def test_two_hosts_are_one(tmp_path: Path) -> None:
    one = run_numbers(tmp_path / "one", 1, 2, "llama_tied", {"fsdp": 2})
    two = run_numbers(tmp_path / "two", 2, 1, "llama_tied", {"fsdp": 2})
    assert len(one) == 6
    assert two == one


@pytest.mark.full
@pytest.mark.parametrize(("case", "mesh"), FAMILIES, ids=[case for case, _ in FAMILIES])
def test_hosts_and_devices_are_split_in_any_way(case: str, mesh: dict[str, int], tmp_path: Path) -> None:
    one = run_numbers(tmp_path / "one", 1, 4, case, mesh)
    for hosts, devices in ((2, 2), (4, 1)):
        assert run_numbers(tmp_path / f"{hosts}", hosts, devices, case, mesh) == one, json.dumps([hosts, devices])
