"""Is a value of a wrong type in a config.json refused by its key, and an absent key what transformers takes for it?"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jax_client.errors import BadRequestError, UnsupportedError
from jax_client.models.config import Windows, YarnScaling
from jax_client.models.families.registry import config_from_hf
from jax_client.weights.read.load import read_config
from jax_client.weights.read.source import resolve
from support.families import cases, towers
from support.weight_files import FAMILIES, HF_CONFIG, hf_tensors, write_hf

CONFIGS = {name: HF_CONFIG | changes for name, changes in FAMILIES.items()} | cases.CASES | towers.CASES
WRONG = (None, 0, -1, 1.5, "7", "", [], [1], [[1]], {}, {"a": 1}, True, float("nan"), float("inf"), 10**30)
# Keys that a tiny config leaves out, and that some family reads.
MORE = (
    "sliding_window",
    "layer_types",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window_pattern",
    "partial_rotary_factor",
    "mlp_only_layers",
    "quantization_config",
    "use_sliding_window",
    "swiglu_limit",
    "head_dim",
    "norm_topk_prob",
)


def places(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Give the path of every key of a config and of the objects in it."""
    for key, value in config.items():
        if key != "vision_config":
            yield (*path, key)
            if isinstance(value, dict):
                yield from places(value, (*path, key))


@pytest.mark.parametrize("case", CONFIGS)
def test_no_value_gives_an_error_of_another_kind(case: str) -> None:
    base, read = CONFIGS[case], 0
    text = ("text_config",) if "text_config" in base else ()
    for path in dict.fromkeys([*places(base), *((*text, key) for key in MORE)]):
        for value in (..., *WRONG):
            config = copy.deepcopy(base)
            at = config
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value
            if value is ...:
                del at[path[-1]]
            try:
                config_from_hf(config, "config.json")
                read += 1
            except (BadRequestError, UnsupportedError) as error:
                assert str(error).startswith("config.json: "), (path, value)
    assert read  # what a family does not read, and null


@pytest.mark.parametrize(
    ("case", "changes", "says"),
    [
        ("gpt_oss", {"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; it must be 1024 or less"),
        ("qwen3_moe_raw", {"num_hidden_layers": "3"}, "num_hidden_layers is '3'; it must be an integer from 1 on"),
        ("gemma3", {"hidden_size": None}, "hidden_size is None; it must be an integer"),
        ("mistral", {"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; it must be a number above 0"),
        ("mistral", {"max_position_embeddings": None}, "max_position_embeddings is None"),
        ("mistral", {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ("mistral", {"rope_parameters": [1]}, r"rope_parameters is \[1\]; it must be an object"),
        ("mistral", {"eos_token_id": [[1]]}, r"eos_token_id is \[\[1\]\]; it must be a token id"),
        ("mistral", {"rope_parameters": {"rope_theta": 0}}, "rope_theta of the rotary positions is 0"),
        ("qwen3_moe_raw", {"mlp_only_layers": [[1]]}, r"mlp_only_layers is \[\[1\]\]; it must list layers in 0\.\.3"),
        ("qwen3_moe_raw", {"layer_types": 7}, "layer_types is 7; it must be a list"),
        ("gemma3", {"sliding_window_pattern": 1.5}, "sliding_window_pattern is 1.5; it must be an integer"),
        ("gemma3", {"rope_parameters": {"sliding_attention": 7}}, "sliding_attention of rope_parameters is 7"),
        ("gpt_oss", {"architectures": [["GptOss"]]}, r"architecture \['GptOss'\] is not supported"),
    ],
)
def test_the_key_and_what_it_must_be_are_said(case: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises((BadRequestError, UnsupportedError), match=f"^config.json: {says}"):
        config_from_hf(cases.CASES[case] | changes, "config.json")


def test_a_wrong_type_within_text_config_says_so() -> None:
    text = towers.CASES["qwen3_vl_moe"]["text_config"] | {"eos_token_id": [[1]]}
    with pytest.raises(BadRequestError, match=r"^config\.json: text_config: eos_token_id is \[\[1\]\]"):
        config_from_hf(towers.CASES["qwen3_vl_moe"] | {"text_config": text}, "config.json")


def test_a_wrong_end_in_generation_config_is_its_own(tmp_path: Path) -> None:
    path = write_hf(tmp_path, HF_CONFIG, hf_tensors(HF_CONFIG))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [[2]]}))
    with pytest.raises(BadRequestError, match=r"generation_config\.json: eos_token_id is \[\[2\]\]"):
        read_config(resolve(str(path)))


def test_absent_keys_are_what_transformers_takes_for_them() -> None:
    """Otherwise a Mistral has no window, and a gpt-oss turns by frequencies that it was not trained with."""
    mistral = {name: x for name, x in cases.CASES["mistral"].items() if name != "sliding_window"}
    found = config_from_hf(mistral | {"max_position_embeddings": 8192}, "config.json")
    assert found.windows == Windows(size=4096, layers=(0, 1))
    left_out = ("rope_parameters", "head_dim", "sliding_window")
    gpt = {name: x for name, x in cases.CASES["gpt_oss"].items() if name not in left_out}
    found = config_from_hf(gpt, "config.json")
    factor = 0.1 * math.log(32) + 1
    yarn = YarnScaling(factor=32.0, original_context=4096, truncate=False, attention_factor=factor)
    assert (found.head_dim, found.windows, found.rope_theta) == (64, Windows(size=128, layers=(0, 2)), 150_000.0)
    assert found.rope_scaling == yarn
