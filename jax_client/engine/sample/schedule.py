"""Which rows run now, which tiles of which prompts are computed next, and which pages do they get?

Only bookkeeping: nothing here touches a device. A row is one sample of one request. It waits, is placed (gets pages on
one way of the mesh), has the unknown part of its prompt computed tile by tile, takes part in decode blocks until it
stops, and leaves its full pages behind for prompts that begin the same. Where pages run out, the row that came last
goes back to wait, with what it has drawn, and starts again from there; (seed, sample, position) decide what it draws,
so that changes nothing for its owner.

What a tile will hold is published when the tile is planned. That is safe because tiles of one version are computed in
the order in which they were planned, and a row decodes only after the last tile that it depends on.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from jax_client.engine.core.adapters import Snapshot
from jax_client.engine.core.requests import GeneratedRow, GenerationRequest, GenerationResult
from jax_client.engine.sample.pages import PAGE, Pages, Prefix

MAX_VERSIONS = 4  # adapters of one decode batch


class Job:
    """One request: what it asked for, and what is known of its answer so far."""

    def __init__(self, request: GenerationRequest, snapshot: Snapshot | None):
        self.request = request
        self.snapshot = snapshot
        self.future: Future[GenerationResult] = Future()
        self.rows: list[GeneratedRow | None] = [None] * request.num_samples
        self.scores = PromptScores(request) if request.scores_prompt else None
        self.cached_tokens: int | None = None
        self.left = max(1, request.num_samples)  # a request that only scores has one row, which draws nothing

    @property
    def version(self) -> int:
        """What the pages of this job's rows can be shared by."""
        return 0 if self.snapshot is None else self.snapshot.version

    def finish(self, row: Row) -> None:
        """Note that a row is done; complete the request with its last one."""
        if self.rows:
            self.rows[row.sample] = row.result()
        row.after = None  # it leads back to the row, and with it to weights
        self.left -= 1
        if self.left == 0:
            scores = {} if self.scores is None else self.scores.fields()
            rows = [r for r in self.rows if r is not None]
            if self.future.set_running_or_notify_cancel():
                self.future.set_result(GenerationResult(rows=rows, cached_tokens=self.cached_tokens or 0, **scores))


class PromptScores:
    """What was asked about a prompt's own positions; position i is about token i + 1."""

    def __init__(self, request: GenerationRequest):
        length = len(request.tokens_T)
        self._request = request
        self.first = 0 if request.score_last is None else length - 1 - request.score_last
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
    """One page of a row's tokens to compute: where it stands in the row, where it goes, what it may look at.

    `scores` takes the scores of its positions, where they were asked for.
    """

    row: Row
    start: int
    page: int
    table: list[int]
    scores: PromptScores | None
    launched: bool = False


@dataclass(slots=True, eq=False)
class Row:
    """One sample on its way.

    Attributes:
        job, sample: whose it is.
        tokens: the prompt and what was drawn; the keys and values of all but the last are stored once it is ready.
        way: of the mesh, where its pages are.
        pages: that hold its tokens in order.
        node, published: names its last page that others can find, and how many such pages it has.
        copy: a page that the row's last page has to become a copy of before its next step.
        after: the last tile that it depends on.
        served: when it last took part in a decode block, in blocks.
    """

    job: Job
    sample: int
    tokens: list[int]
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

    @property
    def drawn(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - len(self.job.request.tokens_T)

    @property
    def ready(self) -> bool:
        """Whether everything that it reads has been launched."""
        return self.after is None or self.after.launched

    def extend(self, drawn: dict[str, np.ndarray], new: int, stopped: bool, done: bool) -> None:
        """Take what a block drew; cut at a stop string."""
        request = self.job.request
        self.tokens += drawn["tokens"][:new].tolist()
        self.logprobs.append(drawn["logprobs"][:new])
        if k := request.topk_sample:
            self.tops.append((drawn["top_ids"][:new, :k], drawn["top_logprobs"][:new, :k]))
        keep = None
        if request.find_stop is not None:
            keep = request.find_stop(self.tokens[len(request.tokens_T) :])
        if keep is not None:
            del self.tokens[len(request.tokens_T) + keep :]
        if done or keep is not None:
            self.stop_reason = "stop" if stopped or keep is not None else "length"

    def result(self) -> GeneratedRow:
        """Return what was drawn."""
        n = self.drawn
        tops = [np.concatenate(part)[:n] for part in zip(*self.tops, strict=True)] if self.tops else [None, None]
        return GeneratedRow(
            tokens=np.array(self.tokens[len(self.tokens) - n :], np.int32),
            logprobs=np.concatenate(self.logprobs)[:n] if self.logprobs else np.zeros(0, np.float32),
            stop_reason=self.stop_reason or "length",
            top_ids=tops[0],
            top_logprobs=tops[1],
        )


class Schedule:
    """The rows that wait and run, over the pages of each way.

    Args:
        ways: of the mesh that rows are split.
        pages: of each way's pool.
        rows: most rows of a way at once.
        steps: of one decode block.
    """

    def __init__(self, *, ways: int, pages: int, rows: int, steps: int):
        self.pages = [Pages(pages) for _ in range(ways)]
        self.placed: list[Row] = []
        self.waiting: deque[Row] = deque()
        self._most_rows = rows
        self._steps = steps
        self._tiles: OrderedDict[int, list[deque[Tile]]] = OrderedDict()  # by version, then by way
        self._blocks = itertools.count()

    @property
    def capacity(self) -> int:
        """Tokens that one row can have at most."""
        return (self.pages[0].count - 2) * PAGE

    def add(self, job: Job) -> None:
        """Queue the rows of a request."""
        prompt = job.request.tokens_T.tolist()
        self.waiting += [Row(job=job, sample=i, tokens=list(prompt)) for i in range(job.left)]

    def has_room(self) -> bool:
        """Whether more rows than those that are here could run at once."""
        return len(self.placed) + len(self.waiting) < self._most_rows * len(self.pages)

    def forget_cancelled(self) -> None:
        """Drop the rows of requests that were cancelled."""
        if any(row.job.future.cancelled() for row in itertools.chain(self.placed, self.waiting)):
            self.waiting = deque(row for row in self.waiting if not row.job.future.cancelled())
            for row in [row for row in self.placed if row.job.future.cancelled()]:
                if row.ready:  # pages that a planned tile will still write are not given away
                    self._remove(row)

    def place(self) -> None:
        """Place waiting rows, first come first served, as long as one fits."""
        while self.waiting and self._place(self.waiting[0]):
            self.waiting.popleft()

    def next_tiles(self, limit: int) -> tuple[Snapshot | None, list[list[Tile]]]:
        """Return up to `limit` of the `pending_tiles` per way, and their weights; their version's turn is over."""
        version, queues = self._tiles.popitem(last=False)
        taken = [[queue.popleft() for _ in range(min(limit, len(queue)))] for queue in queues]
        if any(queues):
            self._tiles[version] = queues
        return next(tile.row.job.snapshot for tiles in taken for tile in tiles), taken

    def pending_tiles(self) -> int:
        """Return how many tiles the fullest way of the version whose turn it is has."""
        return max((len(q) for q in next(iter(self._tiles.values()))), default=0) if self._tiles else 0

    def next_block(self) -> tuple[list[Snapshot], list[list[Row]]]:
        """Return the rows of each way that the next decode block runs, and the adapters that they use.

        The adapters have one configuration, and are at most `MAX_VERSIONS`; those that waited longest go first. Each
        row has pages for the block; where there are too few, rows that came later go back to wait.
        """
        chosen: list[Row] = []
        snapshots: list[Snapshot] = []
        for row in sorted((r for r in self.placed if r.ready and r.job.rows), key=lambda r: r.served):
            snapshot = row.job.snapshot
            if row not in self.placed:  # it went back for the sake of one before it
                continue
            if snapshot is not None and snapshot not in snapshots:
                if len(snapshots) == MAX_VERSIONS or (snapshots and not _alike(snapshot, snapshots[0])):
                    continue
                snapshots.append(snapshot)
            if self._extend_pages(row):
                chosen.append(row)
        chosen = [row for row in chosen if row in self.placed]  # nor one that went back for the sake of one after it
        block = next(self._blocks)
        for row in chosen:
            row.served = block
        by_way = [[row for row in chosen if row.way == way] for way in range(len(self.pages))]
        used = {row.job.snapshot for row in chosen}
        return [snapshot for snapshot in snapshots if snapshot in used], by_way

    def copied(self, row: Row) -> None:
        """Note that the row's copy has been launched."""
        if row.copy is not None:
            self.pages[row.way].drop([row.copy[0]])
            row.copy = None

    def finish(self, row: Row) -> None:
        """Publish the row's full pages, take it out, and tell its job."""
        self._publish(row)
        self._remove(row)
        row.job.finish(row)

    def give_back(self, row: Row) -> None:
        """Let a row wait again, before all others, with what it has drawn."""
        self._publish(row)
        self._remove(row)
        self.waiting.appendleft(row)

    def _place(self, row: Row) -> bool:
        """Give a row pages and plan its tiles, on the way that knows most of it; say whether there was room."""
        job, count = row.job, len(row.tokens) - 1
        tokens_T = np.array(row.tokens[:count], np.int32)
        # What is to be scored is computed, whether its pages are known or not.
        scores = job.scores if row.sample == 0 and row.drawn == 0 else None
        usable_T = tokens_T if scores is None else tokens_T[: scores.first // PAGE * PAGE]
        sizes = [sum(r.way == way for r in self.placed) for way in range(len(self.pages))]
        ways = [way for way, size in enumerate(sizes) if size < self._most_rows]
        found = {way: self.pages[way].find(job.version, usable_T) for way in ways}
        ways.sort(key=lambda way: (-found[way].tokens, sizes[way]))
        placed = False
        for way in ways:
            if not placed and self._take_pages(row, way, found[way], tokens_T, scores):
                placed = True
            else:
                self.pages[way].drop(found[way].pages)
        return placed

    def _take_pages(
        self, row: Row, way: int, prefix: Prefix, tokens_T: np.ndarray, scores: PromptScores | None
    ) -> bool:
        pages, count = self.pages[way], len(tokens_T)
        draws = bool(row.job.rows)
        tail = count % PAGE and draws
        copied = prefix.tokens % PAGE  # the last known page is a partial one: to be continued in a copy
        planned = 0 if copied else -(-(count - prefix.tokens) // PAGE)
        others = sum(r.way == way for r in self.placed)
        if pages.available < planned + draws + others:  # one page for every row's next block
            return False
        taken = pages.take(planned + draws)
        if taken is None:
            return False
        row.copy = None
        row.way, row.pages, row.node = way, [*prefix.pages, *taken[:planned]], prefix.node
        row.published = prefix.tokens // PAGE
        version = row.job.version
        queues = self._tiles.get(version) or [deque() for _ in self.pages]
        for i in range(planned):
            start = prefix.tokens + i * PAGE
            node = pages.publish(row.node, taken[i], tokens_T[start : start + PAGE])
            if start + PAGE <= count:
                row.node, row.published = node, row.published + 1
            queues[way].append(Tile(row, start, taken[i], row.pages[: start // PAGE + 1], scores))
        if planned:
            self._tiles[version] = queues
        row.after = queues[way][-1] if queues[way] else None
        if draws:
            if tail:
                row.copy = (row.pages.pop(), taken[-1])
            row.pages.append(taken[-1])
        if row.job.cached_tokens is None:
            row.job.cached_tokens = prefix.tokens
        self.placed.append(row)
        return True

    def _extend_pages(self, row: Row) -> bool:
        """Give a row the pages of its next block, if need be those of the rows that came last; say whether it has."""
        left = row.job.request.max_tokens - row.drawn
        need = -(-(len(row.tokens) - 1 + min(self._steps, left)) // PAGE) - len(row.pages)
        while need > 0:
            if (taken := self.pages[row.way].take(need)) is not None:
                row.pages += taken
                break
            last = [r for r in self.placed if r.way == row.way and r.ready][-1]
            self.give_back(last)
            if last is row:
                return False
        return True

    def _publish(self, row: Row) -> None:
        pages = self.pages[row.way]
        for i in range(row.published, (len(row.tokens) - 1) // PAGE):
            tokens_S = np.array(row.tokens[i * PAGE : (i + 1) * PAGE], np.int32)
            row.node = pages.publish(row.node, row.pages[i], tokens_S)

    def _remove(self, row: Row) -> None:
        self.copied(row)
        self.pages[row.way].drop(row.pages)
        row.pages, row.after = [], None
        self.placed.remove(row)


def _alike(a: Snapshot, b: Snapshot) -> bool:
    """Whether two adapters have arrays of the same shapes."""
    return replace(a.spec, seed=0) == replace(b.spec, seed=0)
