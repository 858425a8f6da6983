"""What does each error class mean, and what does one do about it? `EXPLAINED` has the text of `doctor --errors`.

docs/reference/errors.md has the same text, an anchor for each class; a test compares the two and the classes.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass

import click

from jax_client.cli import output
from jax_client.errors import BadRequestError

PAGE = "docs/reference/errors.md"
ALL = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """An error class: when it is raised, a message of it, and what to do."""

    cause: str
    example: str
    advice: str


EXPLAINED = {
    "JaxClientError": Explained(
        cause="The base class of all of them: catch it to catch whatever this package raises on purpose.",
        example="any of the messages below",
        advice="Read the message to its end: it says what was wrong, and then what to do.",
    ),
    "BadRequestError": Explained(
        cause="A value in a call is wrong. It is raised at the call, and nothing was changed.",
        example="data[3].loss_fn_inputs has the key 'weight', which 'cross_entropy' does not read, did you mean "
        "'weights'?; allowed: target_tokens, weights.",
        advice="Correct the argument, the index and the field that the message names, and call again.",
    ),
    "BadTypeError": Explained(
        cause="An argument has another type than the call takes, such as text in place of token ids. It is a TypeError "
        "and a BadRequestError, raised at the call; nothing was changed.",
        example="prompt is text; a model reads token ids. Encode it: "
        "types.ModelInput.from_ints(client.get_tokenizer().encode(text)).",
        advice="Give the type that the message names.",
    ),
    "NotFoundError": Explained(
        cause="There is no model, run, checkpoint, sampler or open session of that name. After ServiceClient.close() "
        "it is a SessionClosedError, one of its kind.",
        example="base_model 'Qwen/qwen3-8b' is unknown. Did you mean 'Qwen/Qwen3-8B'?",
        advice="'jax_client runs list' and 'jax_client checkpoint list' show what is there, 'jax_client model list' "
        "the models; --state-dir or JAX_CLIENT_HOME chooses where they look.",
    ),
    "UnsupportedError": Explained(
        cause="A feature of the API, an architecture, a key of a config or a file format that is refused by name: "
        "computing on without it would be wrong.",
        example="org/new-model: config.json: architecture 'MambaForCausalLM' is not supported; supported are "
        "LlamaForCausalLM, ...",
        advice="Take another model or setting; docs/compatibility.md has what is supported, and "
        "docs/guides/bring-your-own-model.md what a model needs.",
    ),
    "RequestFailedError": Explained(
        cause="A request was accepted and could not be carried out; result() raises it. The state is as it was before "
        'the request. `category` is "user" where another input would succeed, "server" where the machine or this '
        "package failed.",
        example="the hub refused 'org/model': 503 Server Error. Check HF_TOKEN, try again later, or give a local "
        "directory.",
        advice='Do what the message says, then send the request again; the client stays usable. For "server", '
        "'jax_client doctor' looks at the disk and the devices.",
    ),
    "DoesNotFitError": Explained(
        cause="A device has too little free memory for a model or an adapter; nothing was allocated.",
        example="the base model needs 15.26 GiB per device (weights 15.26 GiB), but 11.90 GiB are free. Nothing was "
        "allocated or changed.",
        advice="Close clients that are not used, give a smaller rank or model, more devices in EngineConfig.mesh, or a "
        "larger memory_fraction. 'jax_client estimate MODEL' says what fits before it is loaded.",
    ),
}


def print_errors(name: str, *, as_json: bool) -> None:
    """Print one error class, or all of them.

    Raises:
        BadRequestError: there is no class of that name.
    """
    if name != ALL and name not in EXPLAINED:
        near = difflib.get_close_matches(name, EXPLAINED, n=1)
        guess = f"did you mean {near[0]}?" if near else f"they are {', '.join(EXPLAINED)}."
        raise BadRequestError(f"there is no error class {name!r}; {guess}")
    chosen = EXPLAINED if name == ALL else {name: EXPLAINED[name]}
    if as_json:
        output.print_json([{"error": each, **asdict(found), "page": page(each)} for each, found in chosen.items()])
        return
    for each, found in chosen.items():
        click.echo(click.style(each, bold=True))
        click.echo(f"  when   {found.cause}\n  says   {found.example}\n  do     {found.advice}\n  page   {page(each)}")


def page(name: str) -> str:
    """Return where the documentation has a class."""
    return f"{PAGE}#{name.lower()}"
