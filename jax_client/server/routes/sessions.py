"""How does a client begin, show that it lives, and end? It asks for the configuration, then begins a session."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.routing import Route
from tinker import types
from tinker.types import ClientConfigResponse, ClientDynamicConfigResponse, SessionHeartbeatRequest

from jax_client.server.routes.handler import parsed, route, unparsed, with_object
from jax_client.server.state.server import Server

# What this server can do beyond the least that the SDK expects of one.
CLIENT_CONFIG = ClientConfigResponse(sample_join_sampling_session=True, custom_loss_server_side=True)
# Of what a client says of its session's end.
MAX_DETAIL = 1_000
DYNAMIC_CONFIG = ClientDynamicConfigResponse(sample_cancel_enabled=True)


def session_routes(server: Server) -> list[Route]:
    """Return the routes."""

    def heartbeat(asked: SessionHeartbeatRequest) -> dict[str, str]:
        server.live.session(asked.session_id).check_open()
        return {"type": "session_heartbeat"}

    def finish(request: Request, fields: dict[str, Any]) -> dict[str, Any]:
        reason, detail = fields.get("reason") or {}, fields.get("detail")
        status = reason.get("type", "success") if isinstance(reason, dict) else "success"
        # A program's last exception may be of any length; every refusal of the ended session repeats this.
        text = None if detail is None else str(detail)[:MAX_DETAIL]
        server.finish_session(request.path_params["session"], str(status), text)
        return {}

    return [
        route("POST", "/client/config", unparsed(lambda: CLIENT_CONFIG)),
        route("POST", "/client/dynamic_config", unparsed(lambda: DYNAMIC_CONFIG)),
        route("POST", "/create_session", parsed(types.CreateSessionRequest, server.create_session, cheap=True)),
        route("POST", "/session_heartbeat", parsed(SessionHeartbeatRequest, heartbeat, cheap=True)),
        route("POST", "/telemetry", unparsed(lambda: {"status": "accepted"})),
        route("POST", "/sessions/{session}/finish", with_object(finish, cheap=True)),
    ]
