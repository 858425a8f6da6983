"""`jax_client serve`: how does a server start and end?

The command takes the state directory, loads the models, listens for the tinker SDK until a signal arrives, and saves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from jax_client.cli import stages
from jax_client.cli.keys.key_file import read_key_file
from jax_client.cli.server_options import server_options
from jax_client.cli.settings import ServerSettings, print_settings, read_settings
from jax_client.host.proxies import bypassing, through_proxy
from jax_client.server import LOOPBACK

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

    from jax_client.engine.protocol import Engine
    from jax_client.server.keyed import KeyedServers
    from jax_client.server.public_url import PublicUrl
    from jax_client.server.state.server import Server
    from jax_client.server.wire.guard import Guard
    from jax_client.server.wire.keys import Key

# The longest that saving may take where a person waits, who can press Ctrl-C.
PATIENT_SECONDS = 600.0
# A thread that only computes, such as one that traces an uploaded loss, keeps Python's lock for so long while others
# wait for it. An answer passes through several threads: with Python's own 5 ms a sample took 0.36 in place of 0.1 s.
SWITCH_SECONDS = 0.0005
ANY_HOST = ("0.0.0.0", "::")


@click.command("serve")
@server_options(private=False)
@click.pass_context
def serve(ctx: click.Context, **_: object) -> None:
    """Serve the tinker SDK: point TINKER_BASE_URL at the URL that is printed.

    Every setting can be a flag, a variable of the environment, or a line of the TOML file; a flag goes before a
    variable, a variable before the file.
    """
    settings = read_settings(ctx)
    if ctx.params["show_config"]:
        print_settings(ctx)
        return
    sys.setswitchinterval(SWITCH_SECONDS)
    host = settings.host
    opening = f"--host {host}" if host not in LOOPBACK else f"--public-url {settings.public_url}"
    if (host not in LOOPBACK or settings.public_url) and settings.api_key is None and settings.api_key_file is None:
        raise click.UsageError(f"{opening} lets other machines in; give an --api-key too, or an --api-key-file.")
    keys = None if settings.api_key_file is None else read_key_file(settings.api_key_file)
    listening = listen(host, settings.port)
    address = listening.getsockname()[:2]
    taken = "stop that one, or give another --state-dir"
    with private_files(), opened(settings, taken, remembers=keys is None) as host_server:
        own = () if host in LOOPBACK else (socket.gethostname(), socket.getfqdn())
        server, app = _guarded(host_server, keys, settings, {host, *settings.allow_hosts, *LOOPBACK, *own})
        page = page_url(*address, public=settings.public_url)
        app.announce_page(lambda query: stages.say(f"dashboard: {page}{query}"))
        if proxies := through_proxy(os.environ, address[0]):
            stages.say(f"{' and '.join(proxies)} set: clients on this machine need {_exceptions(address[0])}")
        key = "the key you gave" if settings.api_key else f"one of {len(keys)} keys" if keys else "tml-any"
        with _told(host_server, settings):
            number = _run(app, listening, f"ready: TINKER_BASE_URL={url(*address)} TINKER_API_KEY={key}")
        save(server, hurried=number in (signal.SIGTERM, signal.SIGHUP))
    if number is not None:
        raise click.exceptions.Exit(128 + number)


def _guarded(
    server: Server, keys: list[Key] | None, settings: ServerSettings, hosts: set[str]
) -> tuple[Server | KeyedServers, Guard]:
    """Return what answers, one server or one for each key, and its application."""
    from jax_client.server.app import build_app, build_keyed_app
    from jax_client.server.keyed import KeyedServers
    from jax_client.server.state.request_log import RequestLog

    if keys is None:
        app = build_app(
            server, api_key=settings.api_key, hosts=hosts, page=True, logs=settings.logs, public=settings.public_url
        )
        return server, app
    servers = KeyedServers(server, keys, lambda name: RequestLog(settings.home, name, len(keys)))
    shown = ", ".join(key.owner.name + (" (admin)" if key.owner.admin else "") for key in keys)
    stages.say(f"keys: {shown}")
    without = sum("owner" not in fields for _, fields in server.live.own.store.runs())
    if without and not any(key.owner.admin for key in keys):
        stages.say(f"{without} runs were made without keys; a key that is marked admin in the file would have them")
    return servers, build_keyed_app(servers, hosts=hosts, page=True, logs=settings.logs, public=settings.public_url)


def _exceptions(host: str) -> str:
    return " ".join(f"{name}={value}" for name, value in bypassing(os.environ, host).items())


@contextlib.contextmanager
def private_files() -> Iterator[int]:
    """Make every file for this user only until the body ends; yield the umask of before, for other programs."""
    before = os.umask(0o077)
    try:
        yield before
    finally:
        os.umask(before)


@contextlib.contextmanager
def opened(settings: ServerSettings, advice: str, *, remembers: bool, script: str | None = None) -> Iterator[Server]:
    """Lock the state directory, make the server, and load its models.

    Args:
        settings: of the server.
        advice: what to do when another process has the directory.
        remembers: whether its clients may continue with the next server on this directory.
        script: the program whose server it is, where that is known.

    Raises:
        click.ClickException: another process has locked it, it cannot be written, or others may read it and it is not
            the package's own.
    """
    # Imported here: --help and --show-config need none of it.
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from jax_client.checkpoint.disk import files, run_lock
    from jax_client.errors import UnsupportedError
    from jax_client.host import disk
    from jax_client.server.model_names import ModelNames
    from jax_client.server.state.request_log import RequestLog
    from jax_client.server.state.server import Server

    # Its bars would be drawn over the line that shows the progress of a download.
    disable_progress_bars()
    try:
        files.make_directories(settings.home, settings.home)
        if (mode := files.make_private(settings.home, _is_state)) is not None:
            stages.say(f"{settings.home} had mode {mode:04o}; now it and its files are this user's only")
        claim = run_lock.acquire(settings.home)
    except run_lock.RunLockedError as error:
        raise click.ClickException(f"{settings.home} is served by {error}; {advice}.") from None
    except UnsupportedError as error:
        raise click.ClickException(f"--state-dir: {error}.") from None
    except OSError as error:
        raise click.ClickException(f"nothing can be saved: {error}. {disk.advice(error, settings.home)}") from None
    try:
        names = ModelNames(settings.aliases, settings.models, settings.models_dirs)
        server = Server(settings.engine, names, RequestLog(settings.home) if remembers else None, script=script)
        stages.say(f"state directory: {settings.home}")
        for name, other in settings.engine.map_loss.items():
            stages.say(f"warning: {name} is computed as {other}, which is another loss (--map-loss {name}={other})")
        for name in settings.models:
            _load(server, name, settings)
        yield server
    finally:
        claim.release()


def _is_state(name: str) -> bool:
    """Return whether this package makes an entry of such a name in a state directory."""
    own = ("runs", "server.", "metrics.sqlite", "catalogue.sqlite", ".owner", ".lock", ".tmp-")
    return name.startswith(own)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address.

    Raises:
        click.ClickException: the port is in use, or the address is not this machine's.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise click.ClickException(
            f"port {port} of {host} cannot be listened on ({os.strerror(error.errno or 0)}); give another --port."
        ) from None
    return listening


def url(host: str, port: int) -> str:
    """Return the value of TINKER_BASE_URL."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def page_url(host: str, port: int, public: PublicUrl | None = None) -> str:
    """Return the address of the page that shows runs; of a server on every address, under this machine's name."""
    if public is not None:
        return f"{public}/"
    return f"{url(socket.gethostname() if host in ANY_HOST else host, port)}/"


def uvicorn_server(app: ASGIApp) -> uvicorn.Server:
    """Return the HTTP server, which is not started."""
    from jax_client.server.wire.connections import allow_many_files, collect_rarely, http_server

    allow_many_files()
    collect_rarely()
    return http_server(app)


def save(server: Server | KeyedServers, *, hurried: bool) -> None:
    """End every session: unsaved steps are saved, and the line that resumes from them is printed.

    Args:
        server: one that no longer answers.
        hurried: whether the machine may be switched off soon.
    """
    from jax_client.runs.lifecycle.autosave import SIGNAL_SECONDS

    stages.say("stopping: saving what was trained")
    server.close(SIGNAL_SECONDS if hurried else PATIENT_SECONDS)


def _load(server: Server, name: str, settings: ServerSettings) -> None:
    start, meant = time.monotonic(), server.names.alias(name)
    loading = server.live.own.base_model(meant)

    def progress_text() -> str:
        progress = server.live.own.models.loading(meant, settings.engine)
        if progress is None:
            return f"loading {name}"
        _, _, bytes_ = str(progress).partition(" ")
        return f"{progress.stage} {name} {bytes_}".rstrip()

    engine = stages.wait(loading, progress_text).model.engine
    described = engine.monitor.describe()
    device, weights = described["device"], described["memory_bytes"]["weights"] / 1e9
    stages.say(
        f"loaded {name}: {weights:.2f} GB in {described['dtype']} on {device['count']} x {device['kind']}, "
        f"{time.monotonic() - start:.1f} s"
    )
    if settings.warmup:
        _compile(engine, name, settings)


def _compile(engine: Engine, name: str, settings: ServerSettings) -> None:
    from jax_client.values import LoraSpec

    start = time.monotonic()
    lengths = ", ".join(map(str, settings.warmup))
    warming = engine.warmup(LoraSpec(rank=settings.warmup_rank, seed=0), list(settings.warmup), 1, sampling=True)
    compiled = stages.wait(warming, lambda: f"compiling {name} for sampling and for training on lengths {lengths}")
    cached = sum(record.cached for record in compiled)
    stages.say(
        f"compiled {name}: {len(compiled)} programs, {cached} of them from the cache, {time.monotonic() - start:.1f} s"
    )


@contextlib.contextmanager
def _told(server: Server, settings: ServerSettings) -> Iterator[None]:
    """Let the log tell of clients, runs and compiles as they come and go, and of the speed, unless --no-progress."""
    from jax_client.server.ops.activity import ActivityLog

    if not settings.engine.progress:
        yield
        return
    logger = logging.getLogger("jax_client")
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        with ActivityLog(server.live.own.models):
            yield
    finally:
        logger.setLevel(before)


def _run(app: ASGIApp, listening: socket.socket, ready: str) -> int | None:
    """Print `ready`, serve until a signal arrives, and return its number."""
    server = uvicorn_server(app)
    stopped: list[int] = []

    def stop(number: int, _: object) -> None:
        stopped.append(number)
        server.should_exit = True

    # Uvicorn handles SIGTERM and SIGINT, then raises them again for the handlers before it; a second signal ends the
    # process. It does not know SIGHUP, which is ignored where a server is to outlive its terminal (nohup).
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        # A reader of the line may connect, or send a signal, at once.
        listening.listen()
        stages.say(ready)
        with stages.with_times():
            server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return stopped[0] if stopped else None
