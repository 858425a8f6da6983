"""What state does a sampling request have: its job, its rows, their tiles, and the scores of its prompt?

A job has one row per sample, or one that draws nothing where only the prompt is scored. Its future is completed when
the last row has finished.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from jax_client.engine.core.adapters import Snapshot
from jax_client.engine.core.requests import GeneratedRow, GenerationRequest, GenerationResult
from jax_client.engine.sample.pages import PAGE
from jax_client.errors import RequestFailedError


class Job:
    """One request and its answer so far.

    Attributes:
        overflowed: whether a logprob of a drawn token was not finite; the request then fails.
    """

    def __init__(self, request: GenerationRequest, snapshot: Snapshot | None):
        self.request = request
        self.prompt_T = np.asarray(request.tokens_T, np.int32)
        self.snapshot = snapshot
        self.future: Future[GenerationResult] = Future()
        self.rows: list[GeneratedRow | None] = [None] * request.num_samples
        self.scores = PromptScores(request) if request.scores_prompt else None
        self.cached_tokens: int | None = None
        self.overflowed = False
        self.left = max(1, request.num_samples)  # a request that only scores has one row, which draws nothing

    @property
    def decodes(self) -> bool:
        """Whether its rows take part in decode blocks; those that only score, or draw in prefill, do not."""
        return bool(self.rows) and not self.request.draws_in_prefill

    @property
    def owner(self) -> str:
        """Whose request it is."""
        return self.request.owner

    @property
    def pages_of(self) -> tuple[str, int]:
        """Whose pages this job's rows read and leave, and of which weights: no owner learns of another's prompts."""
        return self.owner, 0 if self.snapshot is None else self.snapshot.number

    def fail(self, error: BaseException) -> None:
        """Answer with an error, unless it is answered or cancelled."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)

    def refused_beyond(self, capacity: int) -> bool:
        """Fail a request that has no room even alone, with this many tokens in the cache; return whether it was."""
        tokens = self.request.stored_tokens
        if tokens > capacity:
            message = (
                f"sample: prompt and max_tokens are {tokens} tokens together, but the memory that is left holds "
                f"{capacity}. Lower max_tokens, close other clients, or raise EngineConfig.memory_fraction."
            )
            self.fail(RequestFailedError(message, category="user"))
        return tokens > capacity

    def finish(self, row: Row) -> None:
        """Note that a row is done; complete the request with its last one."""
        if self.rows:
            self.rows[row.sample] = row.result()
        row.after = None  # it leads back to the row, and with it to weights
        self.left -= 1
        if self.left == 0:
            scores = {} if self.scores is None else self.scores.fields()
            rows = [r for r in self.rows if r is not None]
            if not self.future.set_running_or_notify_cancel():
                return
            if self.overflowed or not (self.scores is None or self.scores.finite):
                self.future.set_exception(_overflow(self.snapshot))
            else:
                self.future.set_result(GenerationResult(rows=rows, cached_tokens=self.cached_tokens or 0, **scores))


def _overflow(snapshot: Snapshot | None) -> RequestFailedError:
    whose = "the base model" if snapshot is None else f"the model with the adapter of step {snapshot.step}"
    remedy = (
        "Set EngineConfig(dtype='float32')."
        if snapshot is None
        else "Its weights have grown too large: take those of an earlier step, and lower the learning rate."
    )
    return RequestFailedError(f"sample: {whose} computes logits that are not finite. {remedy}", category="user")


class PromptScores:
    """The scores of a prompt's own positions; position i is about token i + 1.

    Attributes:
        targets_TC: int32 ids to score at each position, the prompt's own next token first.
        reported: first position whose logprob and likeliest tokens are reported.
        first: first position that is computed.
        finite: whether all that `fields` found is.
    """

    def __init__(self, request: GenerationRequest):
        self._request = request
        self.finite = True
        # Targets and alternatives are of the whole prompt, whatever else is left out.
        whole = request.targets_TK is not None or request.alternatives > 0
        self.reported = 0 if request.score_last is None else len(request.tokens_T) - 1 - request.score_last
        self.first = 0 if whole else self.reported
        targets = request.tokens_T[1:, None]
        if request.targets_TK is not None:
            targets = np.concatenate([targets, np.maximum(request.targets_TK, 0)], axis=1)
        self.targets_TC = targets.astype(np.int32)
        self._parts: list[tuple[int, dict[str, np.ndarray]]] = []

    def add(self, position: int, scores: dict[str, np.ndarray]) -> None:
        """Take the scores of positions from `position` on."""
        self._parts.append((position, scores))

    def fields(self) -> dict[str, np.ndarray]:
        """Return the fields of `GenerationResult` that were asked for."""
        request, T = self._request, len(self._request.tokens_T)
        logprobs_TC = np.full((T, self.targets_TC.shape[1]), np.nan, np.float32)
        ids_Tk = np.zeros((T, request.topk_prompt), np.int32)
        top_Tk = np.full((T, request.topk_prompt), -99999.0, np.float32)
        drawn_Tk = np.zeros((T, request.alternatives), np.int32)
        drawn_logprobs_Tk = np.zeros((T, request.alternatives), np.float32)
        for start, scores in self._parts:
            first = max(start, self.first)
            at = slice(first + 1, min(start + len(scores["logprobs"]) + 1, T))
            of = slice(first - start, at.stop - 1 - start)
            logprobs_TC[at] = scores["logprobs"][of, : logprobs_TC.shape[1]]
            k = min(ids_Tk.shape[1], scores["top_ids"].shape[1])
            ids_Tk[at, :k], top_Tk[at, :k] = scores["top_ids"][of, :k], scores["top_logprobs"][of, :k]
            drawn_Tk[at] = scores["alternatives"][of, : request.alternatives]
            drawn_logprobs_Tk[at] = scores["alternative_logprobs"][of, : request.alternatives]
        self.finite = bool(np.isfinite(logprobs_TC[self.first + 1 :]).all())
        left_out = slice(0, self.reported + 1)
        logprobs_TC[left_out, 0], ids_Tk[left_out], top_Tk[left_out] = np.nan, 0, -99999.0
        fields: dict[str, np.ndarray] = {}
        if request.prompt_logprobs:
            fields["prompt_logprobs_T"] = logprobs_TC[:, 0]
        if request.topk_prompt:
            fields |= {"topk_ids_Tk": ids_Tk, "topk_logprobs_Tk": top_Tk}
        if request.targets_TK is not None:
            asked_TK = (request.targets_TK >= 0) & ~np.isnan(logprobs_TC[1:, 1:])
            fields["target_logprobs_TK"] = np.where(asked_TK, logprobs_TC[1:, 1:], np.float32(0))
        if request.alternatives:
            fields |= {"alternative_ids_Tk": drawn_Tk[1:], "alternative_logprobs_Tk": drawn_logprobs_Tk[1:]}
        return fields


@dataclass(slots=True, eq=False)
class Tile:
    """One page of a row's tokens to compute.

    Attributes:
        start: position of its first token.
        page: where its keys and values go.
        table: the row's pages up to there, which it attends to.
        scores: takes the scores of its positions, None where the request asks for none.
        draws: whether the row's one token is drawn at its last position.
        places: of a recurrent model, where the row's state is before it, 0 for a row that begins, and the two places
            where it is left, 0 for nowhere.
    """

    row: Row
    start: int
    page: int
    table: list[int]
    scores: PromptScores | None
    draws: bool = False
    places: tuple[int, int, int] = (0, 0, 0)
    launched: bool = False

    @property
    def stop(self) -> int:
        """Position after its last token."""
        return min(self.start + PAGE, self.row.prefilled)


@dataclass(slots=True, eq=False)
class Row:
    """One sample of a job.

    Attributes:
        drawn: the tokens drawn so far.
        way: of the mesh, where its pages are.
        pages: that hold its tokens in order.
        node, published: names its last page that others can find, and how many such pages it has.
        copy: a page that the row's last page has to become a copy of before its next step.
        after: the last tile that it depends on.
        served: when it last took part in a decode block, in blocks.
        packed: what its request says, as decode blocks take it.
        place, mark: of a recurrent model, where its state is, and where decoding leaves that behind each full page.
        decoded_from: how many tokens are computed before decoding begins.
        cut: whether it ended before the last token that was drawn, at a stop string.
    """

    job: Job
    sample: int
    drawn: list[int] = field(default_factory=list)
    way: int = 0
    pages: list[int] = field(default_factory=list)
    node: int = 0
    published: int = 0
    copy: tuple[int, int] | None = None
    after: Tile | None = None
    served: int = -1
    logprobs: list[np.ndarray] = field(default_factory=list)
    tops: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    stop_reason: Literal["stop", "length"] | None = None
    packed: np.ndarray | None = None
    place: int = 0
    mark: int = 0
    decoded_from: int = 0
    cut: bool = False

    @property
    def used_pages(self) -> list[int]:
        """Return the pages that it uses, that of which its last one becomes a copy too."""
        return self.pages if self.copy is None else [*self.pages, self.copy[0]]

    @property
    def owner(self) -> str:
        """Whose row it is."""
        return self.job.request.owner

    @property
    def length(self) -> int:
        """Tokens of the prompt and of what was drawn; the keys and values of all but the last are stored once ready."""
        return len(self.job.prompt_T) + len(self.drawn)

    @property
    def left(self) -> int:
        """Tokens that it may still draw."""
        return self.job.request.max_tokens - len(self.drawn)

    def lacking_pages(self, steps: int) -> int:
        """Return how many pages it lacks to draw `steps` more tokens, or all that are left; 0 or less for none."""
        return -(-(self.length - 1 + min(steps, self.left)) // PAGE) - len(self.pages)

    @property
    def newest(self) -> int:
        """The last token of the prompt and of what was drawn."""
        return self.drawn[-1] if self.drawn else int(self.job.prompt_T[-1])

    @property
    def prefilled(self) -> int:
        """Tokens that prefill computes; a decode step computes the newest one itself."""
        return len(self.job.prompt_T) if self.job.request.draws_in_prefill else self.length - 1

    @property
    def scores(self) -> PromptScores | None:
        """What takes the prompt's scores, for the row that computes them."""
        return self.job.scores if self.sample == 0 and not self.drawn else None

    @property
    def first_needed(self) -> int:
        """First position that has to be computed even where its page is published; `prefilled` for none."""
        first = self.prefilled if self.scores is None else self.scores.first
        return min(first, self.prefilled - 1) if self.job.request.draws_in_prefill else first

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens at positions start to stop, int32; fewer at the row's end."""
        prompt_T, n = self.job.prompt_T, len(self.job.prompt_T)
        if stop <= n:
            return prompt_T[start:stop]
        return np.concatenate([prompt_T[start:], np.array(self.drawn[max(0, start - n) : stop - n], np.int32)])

    @property
    def ready(self) -> bool:
        """Whether everything that it reads has been launched."""
        return self.after is None or self.after.launched

    def extend(
        self,
        tokens: list[int],
        logprobs: np.ndarray,
        tops: tuple[np.ndarray, np.ndarray],
        *,
        finite: bool,
        stopped: bool,
        done: bool,
    ) -> None:
        """Take the tokens that a block drew; cut at a stop string.

        Args:
            tokens: that were drawn.
            logprobs: of these.
            tops: ids and logprobs of the likeliest tokens (N, k), at least as many as the request asks for.
            finite: whether all logprobs are.
            stopped: whether the last token is a stop token.
            done: whether the row has ended.
        """
        request = self.job.request
        if not finite:
            self.job.overflowed, self.stop_reason = True, "length"
            return
        self.drawn += tokens
        self.logprobs.append(logprobs)
        if k := request.topk_sample:
            self.tops.append((tops[0][:, :k], tops[1][:, :k]))
        keep = None if request.find_stop is None else request.find_stop(self.drawn)
        if keep is not None:
            self.cut = True
            del self.drawn[keep:]
        if done or keep is not None:
            self.stop_reason = "stop" if stopped or keep is not None else "length"

    def draw_in_prefill(self, scores: dict[str, np.ndarray]) -> None:
        """Take the one token from the scores of the prompt's last position, arrays (1, ...)."""
        token, logprobs = int(scores["alternatives"][0, 0]), scores["alternative_logprobs"][:, 0]
        stopped, finite = token in self.job.request.stop_ids, bool(np.isfinite(logprobs).all())
        tops = scores["top_ids"], scores["top_logprobs"]
        self.extend([token], logprobs, tops, finite=finite, stopped=stopped, done=True)

    def result(self) -> GeneratedRow:
        """Return what was drawn."""
        n = len(self.drawn)
        tops = [np.concatenate(part)[:n] for part in zip(*self.tops, strict=True)] if self.tops else [None, None]
        return GeneratedRow(
            tokens=np.array(self.drawn, np.int32),
            logprobs=np.concatenate(self.logprobs)[:n] if self.logprobs else np.zeros(0, np.float32),
            stop_reason=self.stop_reason or "length",
            top_ids=tops[0],
            top_logprobs=tops[1],
        )


def take_scores(tiles: Sequence[Sequence[Tile]], host: dict[str, np.ndarray]) -> None:
    """Give the tiles of each way, and their rows, what a prefill returned for them."""
    for way, placed in enumerate(tiles):
        for i, tile in enumerate(placed):
            part = {name: array[way, i * PAGE : (i + 1) * PAGE] for name, array in host.items()}
            if tile.scores is not None:
                tile.scores.add(tile.start, part)
            if tile.draws:
                last = tile.stop - 1 - tile.start
                tile.row.draw_in_prefill({name: array[last : last + 1] for name, array in part.items()})


def extend(rows: Sequence[Sequence[Row]], host: dict[str, np.ndarray]) -> None:
    """Give the rows of each way what a decode block drew for them; those that had ended before take nothing."""
    logprobs = host["logprobs"]
    drawn = np.arange(logprobs.shape[-1]) < host["new"][..., None]
    finite = (np.isfinite(logprobs) | ~drawn).all(axis=-1).tolist()
    tokens, new, stopped, done = (host[name].tolist() for name in ("tokens", "new", "stopped", "done"))
    none = np.zeros((0, 0))
    for way, members in enumerate(rows):
        for i, row in enumerate(members):
            if row.stop_reason is not None:
                continue
            n = new[way][i]
            tops = (
                (host["top_ids"][way, i, :n], host["top_logprobs"][way, i, :n]) if "top_ids" in host else (none, none)
            )
            row.extend(
                tokens[way][i][:n],
                logprobs[way, i, :n],
                tops,
                finite=finite[way][i],
                stopped=stopped[way][i],
                done=done[way][i],
            )
