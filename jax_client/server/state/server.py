"""What is a server without its HTTP? A ledger of requests, live objects, and what turns one into calls of the other.

`README.md` beside this folder draws the states of a request and of a model.
"""

from __future__ import annotations

import time

from tinker import types

from jax_client.config import EngineConfig
from jax_client.runs import checks
from jax_client.runs.lifecycle.base_models import BaseModels
from jax_client.runs.lifecycle.session import SessionInfo
from jax_client.runs.listings import Listings
from jax_client.server.model_names import ModelNames
from jax_client.server.state.eviction import Eviction
from jax_client.server.state.ledger import RequestLedger
from jax_client.server.state.live_objects import ClientObjects, LiveObjects
from jax_client.server.state.orphans import Orphans
from jax_client.server.state.pending import PendingRequest
from jax_client.server.state.request_log import Entry, RequestLog
from jax_client.server.state.sampling_requests import SamplingRequests
from jax_client.server.state.tables import Records
from jax_client.server.state.training_requests import TrainingRequests
from jax_client.server.wire import answers
from jax_client.server.wire.accounts import Account
from jax_client.server.wire.answers import Answer
from jax_client.values import Owner


class Server:
    """The members that answer the protocol, each with one kind of state. Thread-safe.

    Attributes:
        ledger: the requests: those without an answer, the newest answers, the queue of every model, the request log.
        live: the objects in memory: sessions, models, samplers, uploaded losses; and their eviction.
        training: what turns training requests into calls of runs.
        sampling: what turns sampling requests into calls of samplers.
        orphans: what cancels the samples of clients that are gone.
        listings: the runs and checkpoints on disk.
        account: what the clients have in use, each kind within its quota.
        owner: whose server it is, where each key has one; None is for all clients.

    Args:
        config: engine settings of every session.
        names: which names of base models clients may send; None takes every one, paths of any file included.
        log: keeps requests, answers and records over a restart; None keeps them in memory.
        clients: objects of this process's clients, which are served too.
        base_models: where base models are loaded; None shares those of the process.
        owner: whose runs and checkpoints its clients have; None is for all.
        account: what counts the clients' use; None makes one.
        peers: the evictions of all servers on the same devices.
        script: the program whose server it is, where that is known.
    """

    def __init__(
        self,
        config: EngineConfig,
        names: ModelNames | None = None,
        log: RequestLog | None = None,
        clients: ClientObjects | None = None,
        *,
        base_models: BaseModels | None = None,
        owner: Owner | None = None,
        account: Account | None = None,
        peers: list[Eviction] | None = None,
        script: str | None = None,
    ) -> None:
        self.config = config
        self._script = script
        self.owner = owner
        self.names = names or ModelNames()
        records = Records(log)
        self.ledger = RequestLedger(log, self._lost_answer)
        self.account = account or Account()
        self.account.relieve = self.ledger.queues.give_up
        queues = self.ledger.queues
        self.live = LiveObjects(config, records, queues, self.account, clients, base_models, owner, peers)
        self.training = TrainingRequests(self.live, self.ledger, self.names.meaning, self.account)
        self.sampling = SamplingRequests(self.live, self.ledger, records, self.names.meaning, self.account)
        self.listings = Listings(self.live.own)
        self.orphans = Orphans(self.live, self.ledger)

    def create_session(self, request: types.CreateSessionRequest) -> types.CreateSessionResponse:
        """Begin a session."""
        checks.tags(request.tags)
        checks.text_or_none("sdk_version", request.sdk_version)
        info = SessionInfo(
            user_metadata=checks.user_metadata_or_none(request.user_metadata),
            project_id=checks.text_or_none("project_id", request.project_id),
            display_name=checks.text_or_none("display_name", request.display_name),
            script=self._script,
        )
        return types.CreateSessionResponse(session_id=self.live.add_session(info).session_id)

    def finish_session(self, session_id: str, reason: str, detail: str | None) -> None:
        """End a session; its runs are saved and its memory is freed in the background."""
        status = reason if reason in ("success", "errored", "interrupted") else "success"
        self.live.end_session(session_id, self.live.session(session_id), status, detail)

    def waiting_reason(self, request: PendingRequest) -> str | None:
        """Return what a request without an answer waits for, None while its work runs.

        A request that has waited too long for an earlier one is given up.
        """
        owner, _, _ = request.request_id.rpartition(":")
        models, samplers = self.live.models, self.live.samplers
        model_id = next((key for key in (owner, request.request_id) if models.in_memory(key) is not None), None)
        if model_id is not None and not request.begun:
            queue = self.ledger.queues.of(model_id)
            queue.give_up()
            missing = queue.missing()
            if missing is not None:
                return f"request {missing} of this model has not come"
        if request.waits_for is not None and (loss := request.waits_for()) is not None:
            return loss
        served = samplers.in_memory(owner) if model_id is None else models.in_memory(model_id)
        if served is None:
            return None
        name = served.base_model_name
        progress = None if name is None else self.live.own.models.progress(name, self.config, request.kind)
        ahead = self.ledger.ahead_of(request)
        return progress or (f"{ahead} requests ahead" if ahead else None)

    def _lost_answer(self, request_id: str, entry: Entry) -> Answer:
        """Return the answer of a request that an earlier server accepted and did not answer."""
        if entry.kind == "sample":
            return answers.retry_later("the server was restarted before it answered; send the request again.")
        owner, _, number = request_id.rpartition(":")
        if owner.endswith(":train"):
            owner, number = request_id, "that makes it"
        advice = self.live.resume_advice(owner)
        return answers.refusal(
            f"the server was restarted before request {number} of {owner} was answered. {advice}", "server"
        )

    def close(self, seconds: float) -> None:
        """Finish the training that has begun, save every model, and end every session.

        Args:
            seconds: limit in seconds; what is not saved by then is lost, as if the server had been killed.
        """
        deadline = time.monotonic() + seconds
        for loss in self.live.losses.values():  # what waits for one to be compiled has not changed its model
            loss.program.close()
        # Most of the time is for the work that runs; saving takes its share of it too.
        self.ledger.finish(0.6 * seconds)
        self.live.close(deadline)
        self.ledger.close()
