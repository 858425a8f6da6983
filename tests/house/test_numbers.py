"""Are training and sampling bit for bit what they were?

The test compares hashes with those of an earlier package, which `goldens/numbers.json` holds by kind of machine:
another processor or another jax gives other bits. A change that means to alter them stores them anew by
`python tests/support/number_hashes.py --store tests/goldens/numbers.json`. On a kind that is not stored an older
package serves: build its wheel, `pip install --no-deps --target DIR WHEEL`, and set `JAX_CLIENT_OLDER=DIR`; the test
runs that package in processes of its own. Without both, the test compares two runs of this package.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from support.golden_cases import CASES, GOLDENS, base_values
from support.number_hashes import (
    LOSS_CASE,
    case_hashes,
    differences,
    hashes_by_children,
    machine_kind,
    write_model,
)

STORED = GOLDENS / "numbers.json"


@pytest.mark.full
def test_every_bit_is_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    _, ours = hashes_by_children()
    references = {}
    if stored := json.loads(STORED.read_text()).get(machine_kind()):
        references[STORED.name] = stored
    if older := os.environ.get("JAX_CLIENT_OLDER"):
        package, references["JAX_CLIENT_OLDER"] = hashes_by_children(Path(older).resolve())
        assert package.is_relative_to(Path(older).resolve()), f"{package} was asked, which is not in {older}"
    if not references:
        _, references["a second run"] = hashes_by_children()
        with capsys.disabled():
            print(f"\n{STORED.name} has no hashes of {machine_kind()!r}, and JAX_CLIENT_OLDER is not set: two runs of "
                  "this package are compared with each other.")  # fmt: skip
    for reference, theirs in references.items():
        assert not (found := differences(ours, theirs)), "\n".join([f"other bits than in {reference}:", *found])


@pytest.mark.full
def test_one_bit_of_one_weight_alters_every_hash(tmp_path: Path) -> None:
    case, remat, dtype = LOSS_CASE
    found = []
    for bit in (0, 1):
        values = base_values(CASES[case])
        values["model.norm.weight"].view(np.uint32)[0] ^= np.uint32(bit)
        model = write_model(tmp_path / f"model-{bit}", CASES[case], values)
        found.append({case: case_hashes(case, remat, dtype, model, tmp_path / f"state-{bit}")})
    assert differences(*found) == [f"{case}: {quantity}" for quantity in sorted(found[0][case])]
