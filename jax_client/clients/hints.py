"""What does a client answer to a name that it does not have? Which client has it, and how that one is made."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, NoReturn

# By the class's name: its module, and how a program gets one.
_CLIENTS = {
    "ServiceClient": ("service", "service = jax_client.ServiceClient()"),
    "TrainingClient": ("training", "service.create_lora_training_client(base_model=..., rank=32).result()"),
    "SamplingClient": ("sampling", "service.create_sampling_client(base_model=...).result()"),
    "RestClient": ("rest", "service.create_rest_client()"),
}
# A shorter way from one client to another.
_FROM = {
    ("TrainingClient", "SamplingClient"): "client.save_weights_and_get_sampling_client().result()",
}


class NamesTheOwner:
    """A base of the clients: a missing attribute says which client has it, or which name is like it."""

    # Not for type checkers, to which every attribute would then be there.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(_missing(type(self), name), name=name, obj=self)


def _missing(cls: type, name: str) -> str:
    own = cls.__name__
    problem = f"{own!r} object has no attribute {name!r}"
    if name.startswith("_"):
        return problem
    for other, (module, made) in _CLIENTS.items():
        if other != own and name in vars(getattr(importlib.import_module(f"jax_client.clients.{module}"), other)):
            return f"{problem}; {other} has it. Get one by {_FROM.get((own, other), made)}."
    near = difflib.get_close_matches(name, [each for each in dir(cls) if not each.startswith("_")], n=1)
    return f"{problem}; did you mean {near[0]!r}?" if near else problem
