"""What is a built-in loss? A `Loss`: a function of target logprobs, with what it reads and what it reports.

Every loss file ends with one; `registry` collects them. Validation, packing and the forward program read its fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax

Arrays = Mapping[str, jax.Array]
# fn(logprobs_BTC, inputs) -> (loss per target, statistics per target), float32 (B, T, C) like the inputs. Beside a
# loss's own inputs and settings there is `segments_BT`, int32, which numbers the datums of a row.
LossFn = Callable[[jax.Array, Arrays], tuple[jax.Array, dict[str, jax.Array]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """One built-in loss.

    Attributes:
        name: what a user gives as `loss_fn`.
        fn: the formula. Its values are summed over targets and datums, never normalised.
        inputs: by name, whether the datum must carry it; all float32 in the shape of the targets. An optional input
            that is absent has the value given in `defaults`, `config` or `copies`.
        stats: the statistics that `fn` returns, reported as means over the scored targets.
        mask: the input whose nonzero entries count as scored targets in the metrics.
        config: the settings of `loss_fn_config` and their defaults.
        defaults: the values of other optional inputs.
        copies: optional inputs that are another input where they are absent, by that input's name.
        masked_has_gradient: whether a target outside the mask can have a gradient.
        one_target: whether the loss has no meaning for several targets per position.
    """

    name: str
    fn: LossFn
    inputs: Mapping[str, bool]
    stats: tuple[str, ...]
    mask: str
    config: Mapping[str, float] = field(default_factory=dict)
    defaults: Mapping[str, float] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    masked_has_gradient: bool = False
    one_target: bool = False
