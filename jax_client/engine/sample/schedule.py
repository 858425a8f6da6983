"""Which rows run now, which tiles of which prompts are computed next, and which pages do they get?

`Schedule` only keeps books: nothing here touches a device. A row is one sample of one request. It waits, is placed
(gets pages on one way of the mesh), has the unpublished part of its prompt computed tile by tile, takes part in decode
blocks until it stops, and leaves its full pages behind for prompts that begin the same. Where pages run out, the newest
row is preempted: it waits again, with its drawn tokens, and resumes from there. (seed, sample, position) decide what it
draws, so its client sees no difference.

Owners share alike: the one with the fewest rows is placed next, in place of a row of one who has more if there is no
room; tiles and the adapters of a block are taken from the owners in turn.

A tile's pages are published when the tile is planned. That is safe because tiles of one owner and version are computed
in the order in which they were planned, and a row decodes only after the last tile that it depends on.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from jax_client.engine.core.adapters import Snapshot
from jax_client.engine.sample.pages import PAGE, Pages, Prefix
from jax_client.engine.sample.rows import Job, Row, Tile
from jax_client.engine.sample.waiting import Waiting

MAX_VERSIONS = 4  # adapters of one decode batch


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
        self.waiting = Waiting()
        self._most_rows = rows
        self._steps = steps
        self._tiles: OrderedDict[tuple[str, int], list[deque[Tile]]] = OrderedDict()  # by owner and version, by way
        self._blocks = itertools.count()

    @property
    def capacity(self) -> int:
        """Tokens that one row can have at most."""
        return (self.pages[0].count - 2) * PAGE

    def add(self, job: Job) -> None:
        """Queue the rows of a request."""
        self.waiting.extend(Row(job=job, sample=i) for i in range(job.left))

    def has_room(self) -> bool:
        """Whether more rows could run beside those that wait and run."""
        return len(self.placed) + len(self.waiting) < self._most_rows * len(self.pages)

    def forget_cancelled(self) -> None:
        """Drop the rows of requests that were cancelled, with the tiles that no other row needs."""
        self.waiting.keep(lambda row: not row.job.future.cancelled())
        # The newest first: what it shares with an older one is then that one's alone.
        for row in [row for row in reversed(self.placed) if row.job.future.cancelled()]:
            if not row.ready:
                self._drop_tiles(row)
            self._remove(row)

    def place(self) -> None:
        """Place waiting rows, of the owner with the fewest first, as long as one fits or makes others wait."""
        while (row := self.waiting.next(self.placed)) is not None:
            if self._place(row):
                self.waiting.take(row)
            elif not self._make_way(row.owner):
                break

    def _make_way(self, owner: str) -> bool:
        """Preempt the newest row of the owner with the most, if it then has no fewer than `owner`; return whether."""
        counts = Counter(row.owner for row in self.placed)
        most = max(counts, key=lambda each: counts[each], default=owner)
        if counts[most] < counts[owner] + 2:
            return False
        running = [row for row in self.placed if row.owner == most and row.ready and row.job.decodes]
        running = [row for row in running if row.stop_reason is None]
        if running:
            self.preempt(running[-1])
        return bool(running)

    def next_version(self) -> Snapshot | None:
        """Return the weights of the `pending_tiles`."""
        return next(tile.row.job.snapshot for queue in next(iter(self._tiles.values())) for tile in queue)

    def next_tiles(self, limit: int) -> tuple[Snapshot | None, list[list[Tile]]]:
        """Return up to `limit` of the `pending_tiles` per way, and their weights; then it is the next owner's turn."""
        of, queues = self._tiles.popitem(last=False)
        taken = [[queue.popleft() for _ in range(min(limit, len(queue)))] for queue in queues]
        # Its other versions have the turns that follow of its own.
        for other in [each for each in self._tiles if each[0] == of[0]]:
            self._tiles.move_to_end(other)
        if any(queues):
            self._tiles[of] = queues
        return next(tile.row.job.snapshot for tiles in taken for tile in tiles), taken

    def pending_tiles(self) -> int:
        """Return the number of tiles on the fullest way, of the owner and the version whose turn it is."""
        return max((len(q) for q in next(iter(self._tiles.values()))), default=0) if self._tiles else 0

    def next_block(self) -> tuple[list[Snapshot], list[list[Row]]]:
        """Return the rows of each way that the next decode block runs, and the adapters that they use.

        The adapters have one configuration, and are at most `MAX_VERSIONS`; of each owner those that waited longest go
        first. Each row has pages for the block; where there are too few, newer rows are preempted.
        """
        chosen: list[Row] = []
        snapshots: list[Snapshot] = []
        for row in _in_turn(r for r in self.placed if r.ready and r.job.decodes):
            snapshot = row.job.snapshot
            if row not in self.placed:  # preempted for a row before it
                continue
            if snapshot is not None and snapshot not in snapshots:
                if len(snapshots) == MAX_VERSIONS or (snapshots and not _alike(snapshot, snapshots[0])):
                    continue
                snapshots.append(snapshot)
            if self._extend_pages(row):
                chosen.append(row)
        chosen = [row for row in chosen if row in self.placed]  # nor those preempted for a row after them
        block = next(self._blocks)
        for row in chosen:
            row.served = block
        by_way = [[row for row in chosen if row.way == way] for way in range(len(self.pages))]
        used = {row.job.snapshot for row in chosen}
        return [snapshot for snapshot in snapshots if snapshot in used], by_way

    def shares(self, rows: Iterable[Row]) -> dict[str, float]:
        """Return the part that each owner has of the rows that a program computes, 0 for those of all other rows."""
        parts = Counter(row.owner for row in rows)
        owners = dict.fromkeys((*self.waiting.owners(), *(row.owner for row in self.placed)), 0.0)
        return owners | {owner: count / parts.total() for owner, count in parts.items()}

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

    def preempt(self, row: Row) -> None:
        """Let a row wait again, before all others of its owner, with its drawn tokens."""
        self._publish(row)
        self._remove(row)
        self.waiting.put_first(row)

    def _place(self, row: Row) -> bool:
        """Give a row pages and plan its tiles on the way that has most of its prompt; return whether there was room."""
        job, tokens_T = row.job, row.tokens(0, row.prefilled)
        # Positions to score, or to draw at, are computed, even where their pages are published.
        whole = row.first_needed >= len(tokens_T)
        usable_T = tokens_T if whole else tokens_T[: row.first_needed // PAGE * PAGE]
        sizes = [sum(r.way == way for r in self.placed) for way in range(len(self.pages))]
        ways = [way for way, size in enumerate(sizes) if size < self._most_rows]
        found = {way: self.pages[way].find(job.pages_of, usable_T) for way in ways}
        ways.sort(key=lambda way: (-found[way].tokens, sizes[way]))
        placed = False
        for way in ways:
            if not placed and self._take_pages(row, way, found[way], tokens_T):
                placed = True
            else:
                self.pages[way].drop(found[way].pages)
        return placed

    def _take_pages(self, row: Row, way: int, prefix: Prefix, tokens_T: np.ndarray) -> bool:
        pages, count = self.pages[way], len(tokens_T)
        decodes, in_prefill = row.job.decodes, row.job.request.draws_in_prefill
        tail = count % PAGE and decodes
        copied = prefix.tokens % PAGE  # the last known page is a partial one: to be continued in a copy
        planned = 0 if copied else -(-(count - prefix.tokens) // PAGE)
        others = sum(r.way == way for r in self.placed)
        if pages.available < planned + decodes + others:  # one page for every row's next block
            return False
        taken = pages.take(planned + decodes)
        if taken is None:
            return False
        row.copy = None
        row.way, row.pages, row.node = way, [*prefix.pages, *taken[:planned]], prefix.node
        row.published = prefix.tokens // PAGE
        of = row.job.pages_of
        queues = self._tiles.get(of) or [deque() for _ in self.pages]
        for i in range(planned):
            start = prefix.tokens + i * PAGE
            node = pages.publish(row.node, taken[i], tokens_T[start : start + PAGE])
            if start + PAGE <= count:
                row.node, row.published = node, row.published + 1
            table, draws = row.pages[: start // PAGE + 1], in_prefill and i == planned - 1
            queues[way].append(Tile(row, start, taken[i], table, row.scores, draws))
        if planned:
            self._tiles[of] = queues
        row.after = queues[way][-1] if queues[way] else None
        if decodes:
            if tail:
                row.copy = (row.pages.pop(), taken[-1])
            row.pages.append(taken[-1])
        if row.job.cached_tokens is None:
            row.job.cached_tokens = prefix.tokens
        self.placed.append(row)
        return True

    def _drop_tiles(self, row: Row) -> None:
        """Plan no more of a row's tiles than other rows read; these give no scores."""
        pages, queues = self.pages[row.way], self._tiles[row.job.pages_of]
        own = [tile for tile in queues[row.way] if tile.row is row]
        dropped: dict[Tile, Tile | None] = {}  # to the tile before it in the queue, for rows that wait for it
        while own and not pages.is_shared(own[-1].page):
            pages.withdraw(own[-1].page)
            dropped[own.pop()] = None
        for tile in own:
            tile.scores, tile.draws = None, False
        kept: deque[Tile] = deque()
        for tile in queues[row.way]:
            if tile in dropped:
                dropped[tile] = kept[-1] if kept else None
            else:
                kept.append(tile)
        queues[row.way] = kept
        for other in self.placed:
            if other.after in dropped:
                other.after = dropped[other.after]
        if not any(queues):
            del self._tiles[row.job.pages_of]

    def _extend_pages(self, row: Row) -> bool:
        """Give a row the pages of its next block, if need be by preempting newer rows; return whether it has them."""
        left = row.job.request.max_tokens - len(row.drawn)
        need = -(-(row.length - 1 + min(self._steps, left)) // PAGE) - len(row.pages)
        while need > 0:
            if (taken := self.pages[row.way].take(need)) is not None:
                row.pages += taken
                break
            ready = [r for r in self.placed if r.way == row.way and r.ready]
            counts = Counter(r.owner for r in ready)
            last = max(enumerate(ready), key=lambda at: (counts[at[1].owner], at[0]))[1]
            self.preempt(last)
            if last is row:
                return False
        return True

    def _publish(self, row: Row) -> None:
        pages = self.pages[row.way]
        for i in range(row.published, (row.length - 1) // PAGE):
            row.node = pages.publish(row.node, row.pages[i], row.tokens(i * PAGE, (i + 1) * PAGE))

    def _remove(self, row: Row) -> None:
        self.copied(row)
        self.pages[row.way].drop(row.pages)
        row.pages, row.after = [], None
        self.placed.remove(row)


def _in_turn(rows: Iterable[Row]) -> list[Row]:
    """Return rows from the owners in turn; of each owner those first that took part in a block the longest ago."""
    waited = sorted(rows, key=lambda row: row.served)
    before: Counter[str] = Counter()
    places = []
    for row in waited:
        places.append(before[row.owner])
        before[row.owner] += 1
    return [waited[i] for i in sorted(range(len(waited)), key=lambda i: places[i])]


def _alike(a: Snapshot, b: Snapshot) -> bool:
    """Whether two adapters have arrays of the same shapes."""
    return replace(a.spec, seed=0) == replace(b.spec, seed=0)
