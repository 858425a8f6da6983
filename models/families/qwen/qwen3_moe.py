"""What is a Qwen3 mixture of experts? A Qwen3 with experts in place of the MLP of all layers, or of some."""

from __future__ import annotations

from jax_client.errors import BadRequestError
from jax_client.models.config import Experts, ModelConfig
from jax_client.models.families.family import Family, HfConfig
from jax_client.models.families.hf_config import from_one, refuse_sliding_window, refuse_unless, shared_fields


def config_from_hf(hf: HfConfig, where: str) -> ModelConfig:
    """Read a Qwen3-MoE config.json."""
    refuse_unless(hf, where, "attention_bias", (None, False))
    refuse_sliding_window({"use_sliding_window": False, **hf}, where)
    fields = shared_fields(hf, where)
    experts = read_experts(hf, where, fields["n_layers"])
    return ModelConfig(family="qwen3_moe", qk_norm=True, experts=experts, **fields)


def read_experts(hf: HfConfig, where: str, n_layers: int, *, shared: bool = False) -> Experts:
    """Return the experts of a model with `n_layers` layers; with `shared` one more, which all tokens share."""
    # Two spellings: transformers 5 writes the second. A model without experts is a dense Qwen3 under a wrong name.
    spelled = "num_experts" if "num_experts" in hf else "num_local_experts"
    size = lambda key: from_one(hf[key], key, where)  # noqa: E731
    step = from_one(hf.get("decoder_sparse_step", 1), "decoder_sparse_step", where)
    dense = [] if (listed := hf.get("mlp_only_layers")) is None else listed
    layers = range(n_layers)
    if not isinstance(dense, list) or not all(type(i) is int and i in layers for i in dense):
        raise BadRequestError(f"{where}: mlp_only_layers is {dense!r}; it must list layers in 0..{len(layers) - 1}.")
    count, per_token = size(spelled), size("num_experts_per_tok")
    if per_token > count:
        raise BadRequestError(f"{where}: num_experts_per_tok is {per_token}; it must be {spelled} {count} or less.")
    return Experts(
        count=count,
        per_token=per_token,
        d_ff=size("moe_intermediate_size"),
        normalized=bool(hf["norm_topk_prob"]),
        dense_layers=tuple(i for i in layers if i in dense or (i + 1) % step),
        shared_d_ff=size("shared_expert_intermediate_size") if shared else None,
    )


QWEN3_MOE = Family(name="qwen3_moe", architectures=("Qwen3MoeForCausalLM",), gguf=None, read=config_from_hf)
