"""`jax_client key NAME`: how is one of several keys made? It is printed once, with its line for the server's file.

Nothing keeps the key: the line has its hash.
"""

from __future__ import annotations

import json

import click

from jax_client.cli.options import json_option, wrong_usage


@click.command("key", options_metavar="[OPTIONS]")
@click.argument("name")
@click.option("--admin", is_flag=True, help="Has what was written without keys, and sees the metrics of all keys.")
@click.option("--limit", multiple=True, metavar="LIMIT=NUMBER", help="Such as sessions=64; again for more.")
@json_option
def key(name: str, admin: bool, limit: tuple[str, ...], as_json: bool) -> None:
    """Make a key, and print it and its line for the file of 'serve --api-key-file'.

    The first line of the answer is the key, which is printed once and kept nowhere: give it to the clients as
    TINKER_API_KEY. Append the second line, which has only its hash, to the file, and start the server again.
    """
    # Imported here: --help needs none of it.
    from jax_client.server.wire import keys

    made = keys.new_key()
    with wrong_usage("NAME" if not limit else "--limit"):
        line = keys.line_of(name, made, ([keys.ADMIN] if admin else []) + list(limit))
    if as_json:
        click.echo(json.dumps([{"name": name, "key": made, "line": line}]))
        return
    click.echo(made)
    click.echo(line)
