"""How are a number and a place in a series read from the query of a request?"""

from __future__ import annotations

import re

from starlette.requests import Request

from jax_client.errors import BadRequestError, shown


def number(request: Request, name: str, default: int, least: int, most: int) -> int:
    """Return a number of the query. Raises BadRequestError."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise BadRequestError(f"{name} is {shown(text[:40])}; give a number from {least} to {most}.")
    return int(text)


def cursor(text: str | None) -> str | None:
    """Return the `next` of an earlier answer; None where none was given. Raises BadRequestError.

    It is "POINT-EVENT", in a page's series "GENERATION-POINT-EVENT"; see `runs.overview.run_points`.
    """
    if text is None or re.fullmatch("(?:[0-9a-z]{1,16}-)?[0-9]{1,18}-[0-9]{1,18}", text):
        return text
    raise BadRequestError(f"since is {shown(text[:40])}; give the `next` of an earlier answer, or leave it out.")
