"""Which settings of a run, an optimizer step or a checkpoint are accepted?

Each check takes the user's value and returns the plain one; it names the field, the value and the limit of a bad one.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from tinker import types

from jax_client.engine.core.requests import AdamSettings
from jax_client.errors import BadRequestError, BadTypeError, UnsupportedError
from jax_client.runs.checks.numbers import FLOAT32_LARGEST, FLOAT32_SMALLEST, flag, integer, real, shown
from jax_client.runs.sdk import OptimParamsBase
from jax_client.values import MAX_LORA_RANK, NAME_FORM, LoraSpec, Owner, is_name

# Random keys are made of 32 bits; a larger seed would start like a smaller one.
MAX_LORA_SEED = 2**32 - 1
MAX_METADATA_BYTES = 64 * 1024
# Closer to 1, float32 rounds to 1, and Adam's bias correction divides by 0.
MAX_BETA = 0.9999999
# Of a name for people: display_name, project_id, a tag.
MAX_TEXT = 1_000
MAX_TAGS = 100


class NothingToTrainError(BadRequestError, AssertionError):
    """Every train_ switch is False; also an AssertionError, which the SDK raises here."""


def lora_spec(
    base_model: object, rank: object, seed: object, train_mlp: object, train_attn: object, train_unembed: object
) -> LoraSpec:
    """Check the arguments of a new LoRA run; a seed of None draws one.

    Raises:
        BadRequestError: base_model is missing, rank or seed is out of range, or nothing would be trained.
        BadTypeError: an argument has the wrong type.
    """
    if not isinstance(base_model, str) or not base_model.strip():
        raise BadRequestError(
            f"base_model is required, got {shown(base_model)}; give a model name or a directory. "
            "ServiceClient.get_server_capabilities() lists the models that are here."
        )
    mlp, attn, unembed = (
        flag(field, value)
        for field, value in (
            ("train_mlp", train_mlp),
            ("train_attn", train_attn),
            ("train_unembed", train_unembed),
        )
    )
    if not (mlp or attn or unembed):
        # The SDK's wording, whole: programs and tests match on it.
        raise NothingToTrainError("At least one of train_mlp, train_attn, or train_unembed must be True")
    return LoraSpec(
        rank=integer("rank", rank, 1, MAX_LORA_RANK, "8 to 64 suits most runs; lora_rank= in a recipe."),
        seed=secrets.randbits(31) if seed is None else integer("seed", seed, 0, MAX_LORA_SEED, "None draws one."),
        train_attn=attn,
        train_mlp=mlp,
        train_unembed=unembed,
    )


def warmup_lengths(lengths: object, targets_per_position: object) -> tuple[list[int], int]:
    """Check what to compile ahead for: datum lengths, and K of `[N, K]` targets.

    Raises:
        BadRequestError: there are no lengths, or a number is below 1.
        BadTypeError: not a sequence of integers.
    """
    if not isinstance(lengths, Sequence) or isinstance(lengths, str | bytes):
        raise BadTypeError(f"lengths is {shown(lengths)}; give a list of datum lengths, such as [512, 2048].")
    if not lengths:
        raise BadRequestError("lengths is empty; give at least one datum length, such as [512].")
    width = integer("targets_per_position", targets_per_position, 1)
    return [integer(f"lengths[{i}]", length, 1) for i, length in enumerate(lengths)], width


def user_metadata_or_none(value: object) -> dict[str, str] | None:
    """As `user_metadata`; None, which keeps nothing, stays None."""
    return None if value is None else user_metadata(value)


def user_metadata(value: object) -> dict[str, str]:
    """Return user metadata as a dict of text to text; None is empty.

    Raises:
        BadTypeError: it is not a mapping of str to str.
        BadRequestError: it is larger than 64 KiB in UTF-8, or not encodable.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadTypeError(f"user_metadata is {shown(value)} ({type(value).__name__}); give a dict of str to str.")
    size = 0
    for key, text in value.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise BadTypeError(
                f"user_metadata[{shown(key)}] is {shown(text)} ({type(text).__name__}); keys and values must be str. "
                "Convert them with str() or json.dumps()."
            )
        try:
            size += len(key.encode()) + len(text.encode())
        except UnicodeEncodeError as error:
            raise BadRequestError(
                f"user_metadata[{shown(key)}] is not valid Unicode ({error.reason}); remove lone surrogates."
            ) from None
    if size > MAX_METADATA_BYTES:
        raise BadRequestError(
            f"user_metadata has {size} bytes of keys and values; the limit is {MAX_METADATA_BYTES}. "
            "Keep large texts in a file and put its name here."
        )
    return dict(value)


def text_or_none(field: str, value: object, most: int = MAX_TEXT) -> str | None:
    """Return a short text of the user's; None stays None.

    Raises:
        BadTypeError: it is no text.
        BadRequestError: it has more than `most` characters, or is not encodable.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadTypeError(f"{field} is {shown(value)} ({type(value).__name__}); give a str, or None.")
    if len(value) > most:
        raise BadRequestError(
            f"{field} has {len(value):,} characters, the limit is {most:,}; shorten it, or use user_metadata for the "
            "rest."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRequestError(f"{field} is not valid Unicode ({error.reason}); remove lone surrogates.") from None
    return value


def tags(values: Sequence[object]) -> list[str]:
    """Return the tags of a session. Raises BadRequestError for more than MAX_TAGS, and as `text_or_none`."""
    if len(values) > MAX_TAGS:
        raise BadRequestError(f"tags has {len(values):,} entries, the limit is {MAX_TAGS}; give fewer.")
    return [text for i, value in enumerate(values) if (text := text_or_none(f"tags[{i}]", value)) is not None]


def refuse_optimizer(optimizer: object) -> None:
    """Accept None and AdamOptimizerConfig.

    Raises:
        UnsupportedError: another optimizer of the API.
        BadTypeError: not an optimizer configuration.
    """
    if optimizer is None or isinstance(optimizer, types.AdamOptimizerConfig):
        return
    if isinstance(optimizer, types.DimuonOptimizerConfig) or getattr(optimizer, "type", None) == "dimuon":
        raise UnsupportedError(
            "optimizer is DimuonOptimizerConfig; Dimuon is not supported. Leave optimizer out, or give "
            "AdamOptimizerConfig(), for AdamW."
        )
    raise BadTypeError(
        f"optimizer is {shown(optimizer)} ({type(optimizer).__name__}); give None or AdamOptimizerConfig(). "
        "The learning rate belongs to optim_step(AdamParams(...))."
    )


def refuse_access_token(token: object, owner: Owner | None) -> None:
    """Raise BadRequestError for a token of other weights, where owners are told apart: it would open nothing."""
    if token is not None and owner is not None:
        raise BadRequestError(
            "weights_access_token opens nothing on this server. Ask the owner of the checkpoint to publish it "
            "(publish_checkpoint_from_tinker_path), then every key can load and copy it; leave the token out."
        )


def adam_settings(optim_params: object, adam_params: object) -> AdamSettings:
    """Check the hyper-parameters of one optimizer step, given under either name.

    Raises:
        BadTypeError: neither was given, or it is not AdamParams.
        UnsupportedError: DimuonParams or another optimizer's.
        BadRequestError: both were given, or a field is out of range, that of float32 included.
    """
    if optim_params is not None and adam_params is not None:
        raise BadRequestError("Specify optim_params or legacy adam_params, not both")
    params = optim_params if optim_params is not None else adam_params
    if isinstance(params, OptimParamsBase):
        raise UnsupportedError(
            f"optim_params is {type(params).__name__} ({shown(params.type)}); only AdamW is supported. Give AdamParams."
        )
    if not isinstance(params, types.AdamParams):
        raise BadTypeError(
            f"Expected AdamParams or OptimParamsBase, got {shown(params)} ({type(params).__name__}); "
            "give AdamParams(learning_rate=...)."
        )
    return AdamSettings(
        learning_rate=real("AdamParams.learning_rate", params.learning_rate, 0, FLOAT32_LARGEST),
        beta1=real("AdamParams.beta1", params.beta1, 0, MAX_BETA),
        beta2=real("AdamParams.beta2", params.beta2, 0, MAX_BETA),
        eps=real("AdamParams.eps", params.eps, FLOAT32_SMALLEST, FLOAT32_LARGEST, hint="The default is 1e-12."),
        weight_decay=real("AdamParams.weight_decay", params.weight_decay, 0, FLOAT32_LARGEST),
        grad_clip_norm=_grad_clip_norm(params.grad_clip_norm),
    )


def _grad_clip_norm(value: object) -> float:
    hint = f"0 turns clipping off; the smallest norm is {FLOAT32_SMALLEST:g}."
    limit = real("AdamParams.grad_clip_norm", value, 0, FLOAT32_LARGEST, hint=hint)
    if 0 < limit < FLOAT32_SMALLEST:  # float32 makes it 0, which would turn clipping off
        raise BadRequestError(f"AdamParams.grad_clip_norm is {shown(value)}. {hint}")
    return limit


def checkpoint_name(name: object) -> str:
    """Return the name of a checkpoint if it has the allowed form.

    Raises:
        BadTypeError: not text.
        BadRequestError: empty, too long, or with characters that could leave its directory.
    """
    if not isinstance(name, str):
        raise BadTypeError(f"name is {shown(name)} ({type(name).__name__}); give text of the form {NAME_FORM}.")
    if not is_name(name):
        size = f" of {len(name)} characters" if len(name) > 64 else ""
        raise BadRequestError(
            f"name is {shown(name)}{size}; allowed is {NAME_FORM}: letters, digits, '.', '_' and '-', beginning with a "
            "letter or digit, at most 128 characters. Use a plain name such as 'step-0100', not a path."
        )
    return name
