"""Which rows run now, which tiles of which prompts are computed next, and which pages do they get?

`Schedule` only keeps books: nothing here touches a device. A row is one sample of one request. It waits, is placed
(gets pages on one way of the mesh), has the unpublished part of its prompt computed tile by tile, takes part in decode
blocks until it stops, and leaves its full pages behind for prompts that begin the same. Where pages run out, the newest
row is preempted: it waits again, with its drawn tokens, and resumes from there. (seed, sample, position) decide what it
draws, so its client sees no difference.

Owners share alike: the one who has least of the rows and pages is placed next, in place of rows of one who has more if
there is no room; tiles and the adapters of a block are taken from the owners in turn.

A tile's pages are published when the tile is planned. That is safe because tiles of one owner and version are computed
in the order in which they were planned, and a row decodes only after the last tile that it depends on.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable

import numpy as np

from jax_client.engine.core.adapters import Snapshot
from jax_client.engine.sample.pages import PAGE, Pages, Prefix
from jax_client.engine.sample.rows import Job, Row, Tile
from jax_client.engine.sample.waiting import CacheUse, Waiting, in_turn

MAX_VERSIONS = 4  # adapters of one decode batch
STATE_EVERY = 2048  # tokens of a prompt, behind which a state is kept, as behind its last full page
PATIENCE = 16  # decode blocks for which an owner without any row lets others place theirs before its own


class Schedule:
    """The rows that wait and run, over the pages of each way.

    Args:
        ways: of the mesh that rows are split.
        pages: of each way's pool.
        rows: most rows of a way at once.
        steps: of one decode block.
        states: places of states of each way's pool; 0 for a model that is not recurrent.
    """

    def __init__(self, *, ways: int, pages: int, rows: int, steps: int, states: int = 0):
        self.pages = [Pages(pages, states) for _ in range(ways)]
        self._recurrent = states > 0
        rows = min(rows, (states - 1) // 2) if states else rows
        self.placed: list[Row] = []
        self.waiting = Waiting()
        self._held = CacheUse(all_rows=ways * rows, all_pages=ways * (pages - 1))
        self._without_room: dict[str, int] = {}  # owners without any row, to the block since when there is none for one
        self._most_rows = rows
        self._steps = steps
        self._tiles: OrderedDict[tuple[str, int], list[deque[Tile]]] = OrderedDict()  # by owner and version, by way
        self._block = 0

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

    def forget_ended(self) -> None:
        """Drop the rows of requests that were cancelled or have failed, with the tiles that no other row needs."""
        self.waiting.keep(lambda row: not row.job.future.done())
        kept = self._without_room.keys() & self.waiting.owners()
        self._without_room = {owner: self._without_room[owner] for owner in kept}
        # The newest first: what it shares with an older one is then that one's alone.
        for row in [row for row in reversed(self.placed) if row.job.future.done()]:
            if not row.ready:
                self._drop_tiles(row)
            self._remove(row)

    def place(self) -> None:
        """Place waiting rows, of the owner who has least first, as long as one fits or others can make way for it.

        An owner whose row has no room is passed over. One who has no row at all is so for `PATIENCE` blocks; then
        no other owner's rows are placed, and those that run end and make room.

        That ends, and no rows preempt each other in turn: an owner's last row is never preempted here; an owner's first
        row takes from those who have several, which makes one more owner who has some; a further row takes from those
        who then have no less than its owner, which makes the smaller part larger. Nothing here undoes either.
        """
        passed: set[str] = set()
        while (row := self.waiting.next(self._held, passed)) is not None:
            if self._place(row) or (self._make_way(row) and self._place(row)):
                self.waiting.take(row)
                self._without_room.pop(row.owner, None)
                continue
            if not self._held.rows[row.owner]:
                since = self._without_room.setdefault(row.owner, self._block)
                if self._block - since >= PATIENCE:
                    break
            passed.add(row.owner)

    def _make_way(self, row: Row) -> bool:
        """Preempt as many rows of others as a row needs on one way; return whether they are enough."""
        if len(+self._held.rows) == (self._held.rows[row.owner] > 0):  # there are no others
            return False
        for way in range(len(self.pages)):
            if victims := self._victims(row, way):
                for victim in victims:
                    self.preempt(victim)
                return True
        return False

    def _victims(self, row: Row, way: int) -> list[Row]:
        """Return the rows that a row may have preempted to have room on a way, of who has most the newest first."""
        pages, held, users = self.pages[way], self._held.copy(), Counter[int]()
        tokens_T, usable_T = self._tokens_of(row)
        prefix = pages.find(row.job.pages_of, usable_T)
        lacking, taken = self._lacking(row, way, prefix, len(tokens_T)), _taken(row, prefix, len(tokens_T))
        after = held.part(row.owner, 1, taken + pages.last_of(Counter(prefix.pages)))
        pages.release(prefix)
        here = [each for each in self.placed if each.way == way]
        running = [each for each in here if each.owner != row.owner and each.ready and each.job.decodes]
        running = [each for each in running if each.stop_reason is None]
        victims: list[Row] = []
        while lacking > 0 or len(here) - len(victims) >= self._most_rows:
            most = max((r.owner for r in running if held.rows[r.owner] > 1), key=held.part, default=None)
            if most is None:
                return []
            victims.append(next(each for each in reversed(running) if each.owner == most))
            running.remove(victims[-1])
            before = pages.last_of(users)
            users.update(victims[-1].used_pages)
            freed = pages.last_of(users) - before
            held.rows[most] -= 1
            held.pages[most] -= freed
            if self._held.rows[row.owner] and held.part(most) < after:
                return []
            lacking -= freed + 1  # nor has it a next block
        return victims

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

    @property
    def pending_versions(self) -> int:
        """Owners' versions that have tiles to compute."""
        return len(self._tiles)

    def pass_version_over(self) -> None:
        """Give the turn of the `pending_tiles` to the next owner's."""
        self._tiles.move_to_end(next(iter(self._tiles)))

    def next_rows(self, fits: Callable[[list[Snapshot], int], bool] | None = None) -> tuple[list[Snapshot], list[Row]]:
        """Return the adapters of the next decode block, and the rows that it can run.

        The adapters have one configuration, and are at most `MAX_VERSIONS`; of each owner those that waited longest go
        first.

        Args:
            fits: `f(adapters, rows) -> whether` a block can have these, and as many rows of a way; None for any.
        """
        chosen: list[Row] = []
        snapshots: list[Snapshot] = []
        sizes = Counter[int]()
        for row in in_turn(r for r in self.placed if r.ready and r.job.decodes):
            snapshot, after = row.job.snapshot, snapshots
            if snapshot is not None and snapshot not in snapshots:
                if len(snapshots) == MAX_VERSIONS or (snapshots and not snapshot.is_like(snapshots[0])):
                    continue
                after = [*snapshots, snapshot]
            if fits is not None and not fits(after, max(max(sizes.values(), default=0), sizes[row.way] + 1)):
                continue
            snapshots = after
            sizes[row.way] += 1
            chosen.append(row)
        return snapshots, chosen

    def next_block(self, rows: Iterable[Row] | None = None) -> tuple[list[Snapshot], list[list[Row]]]:
        """Return the rows of each way that the next decode block runs, and the adapters that they use.

        Each row has pages for the block; where there are too few, newer rows are preempted.

        Args:
            rows: that it can run, see `next_rows`.
        """
        chosen = self.next_rows()[1] if rows is None else list(rows)
        # One may be preempted for a row before it, or after it.
        chosen = [row for row in chosen if row in self.placed and self._extend_pages(row)]
        chosen = [row for row in chosen if row in self.placed]
        for row in chosen:
            row.served = self._block
        self._block += 1
        by_way = [[row for row in chosen if row.way == way] for way in range(len(self.pages))]
        used = dict.fromkeys(row.job.snapshot for row in chosen)
        return [snapshot for snapshot in used if snapshot is not None], by_way

    def take_ahead(self, rows: list[list[Row]], flying: int, steps: int) -> dict[Row, int] | None:
        """Give the rows of a block that runs the pages of the block after it, and preempt none for that.

        Args:
            rows: of each way; those that have ended are left out.
            flying: steps that the block runs at most.
            steps: of the next one.

        Returns:
            By row how many pages it got; None if a row could join these, none continues, or there are too few pages.
        """
        going = [row for members in rows for row in members if row.stop_reason is None]
        if self.waiting or self._tiles or len(going) != len(self.placed):
            return None
        lasting = [row for row in going if row.left > flying]
        needs = {row: need for row in lasting if (need := row.lacking_pages(flying + steps)) > 0}
        by_way = Counter[int]()
        for row, need in needs.items():
            by_way[row.way] += need
        if not lasting or any(need > self.pages[way].available for way, need in by_way.items()):
            return None
        taken = {row: need for row, need in needs.items() if self._take_more(row, need)}
        for row in lasting:
            row.served = self._block
        self._block += 1
        return taken

    def _take_more(self, row: Row, need: int) -> bool:
        """Give a row pages at its end; return whether there were enough."""
        if (pages := self.pages[row.way].take(need)) is None:
            return False
        row.pages += pages
        self._held.pages[row.owner] += need
        return True

    def shares(self, rows: Iterable[Row]) -> dict[str, float]:
        """Return the part that each owner has of the rows that a program computes, 0 for those of all other rows."""
        parts = Counter(row.owner for row in rows)
        owners = dict.fromkeys((*self.waiting.owners(), *(row.owner for row in self.placed)), 0.0)
        return owners | {owner: count / parts.total() for owner, count in parts.items()}

    def copied(self, row: Row) -> None:
        """Note that the row's copy has been launched."""
        if row.copy is not None:
            self._drop(row, [row.copy[0]])
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
        tokens_T, usable_T = self._tokens_of(row)
        before = sum(pages.used for pages in self.pages)
        sizes = [sum(r.way == way for r in self.placed) for way in range(len(self.pages))]
        ways = [way for way, size in enumerate(sizes) if size < self._most_rows]
        found = {way: self.pages[way].find(row.job.pages_of, usable_T) for way in ways}
        ways.sort(key=lambda way: (-found[way].tokens, sizes[way]))
        placed = False
        for way in ways:
            if not placed and self._take_pages(row, way, found[way], tokens_T):
                placed = True
            else:
                self.pages[way].release(found[way])
        self._held.pages[row.owner] += sum(pages.used for pages in self.pages) - before
        return placed

    def _tokens_of(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens that a row has computed or finds, and the first of these, which it may find."""
        tokens_T = row.tokens(0, row.prefilled)
        # Positions to score, or to draw at, are computed, even where their pages are published.
        whole = row.first_needed >= len(tokens_T)
        if whole and self._recurrent:
            # The row's own state is what its last tile leaves.
            return tokens_T, tokens_T[: _last_full_page(len(tokens_T))]
        return tokens_T, tokens_T if whole else tokens_T[: row.first_needed // PAGE * PAGE]

    def _lacking(self, row: Row, way: int, prefix: Prefix, count: int) -> int:
        """Return how many pages are missing for a row, and for the next block of every row of a way."""
        others = sum(r.way == way for r in self.placed)
        return _taken(row, prefix, count) + others - self.pages[way].available

    def _take_pages(self, row: Row, way: int, prefix: Prefix, tokens_T: np.ndarray) -> bool:
        pages, count = self.pages[way], len(tokens_T)
        decodes, in_prefill = row.job.decodes, row.job.request.draws_in_prefill
        tail = count % PAGE and decodes
        planned = _planned(prefix, count)
        if self._lacking(row, way, prefix, count) > 0:
            return False
        states = pages.states.take(1 + decodes) if self._recurrent else [0, 0]
        if states is None:
            return False
        taken = pages.take(planned + decodes)
        if taken is None:
            pages.states.drop(states)
            return False
        row.copy, row.decoded_from = None, count
        row.place, row.mark = states[0], states[1] if decodes else 0
        row.way, row.pages, row.node = way, [*prefix.pages, *taken[:planned]], prefix.node
        row.published = prefix.tokens // PAGE
        of = row.job.pages_of
        queues = self._tiles.get(of) or [deque() for _ in self.pages]
        for i in range(planned):
            start = prefix.tokens + i * PAGE
            before = row.node
            node = pages.publish(before, taken[i], tokens_T[start : start + PAGE])
            if start + PAGE <= count:
                row.node, row.published = node, row.published + 1
            table, draws = row.pages[: start // PAGE + 1], in_prefill and i == planned - 1
            tile = Tile(row, start, taken[i], table, row.scores, draws)
            if self._recurrent:
                self._place_states(tile, before, tokens_T, prefix.state if i == 0 else row.place)
            queues[way].append(tile)
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
        self._held.rows[row.owner] += 1
        return True

    def _place_states(self, tile: Tile, before: int, tokens_T: np.ndarray, source: int) -> None:
        """Say where a tile's row has its state before it, and where it leaves it: also behind its page, at times.

        Args:
            tile: of a row that has a place.
            before: the node of the page before its own.
            tokens_T: of the row, that tiles compute.
            source: place of the state before it, of which it is a user already where it is not the row's.
        """
        pages, stop, kept = self.pages[tile.row.way], tile.start + PAGE, 0
        if stop == _last_full_page(len(tokens_T)) or (stop <= len(tokens_T) and stop % STATE_EVERY == 0):
            kept = pages.new_state_behind(before, tokens_T[tile.start : stop])
        tile.places = source, tile.row.place, kept
        pages.states.use(tile.places if source == tile.row.place else tile.places[1:])

    def launched(self, tile: Tile) -> None:
        """Note that a tile runs before all that is launched from now on."""
        tile.launched = True
        self.pages[tile.row.way].states.drop(tile.places)

    def _drop_tiles(self, row: Row) -> None:
        """Plan no more of a row's tiles than other rows read; these give no scores."""
        pages, queues = self.pages[row.way], self._tiles[row.job.pages_of]
        own = [tile for tile in queues[row.way] if tile.row is row]
        dropped: dict[Tile, Tile | None] = {}  # to the tile before it in the queue, for rows that wait for it
        while own and not pages.is_shared(own[-1].page):
            pages.withdraw(own[-1].page)
            pages.states.drop(own[-1].places)
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
        """Give a row the pages of its next block, if need be by preempting rows; return whether it has them.

        Of those who have several rows, the one who has most loses the newest; only where no one has several, its only
        one. So a row grows to its end beside those of others, however long it becomes.
        """
        need = row.lacking_pages(self._steps)
        while need > 0:
            if self._take_more(row, need):
                break
            ready = [r for r in self.placed if r.way == row.way and r.ready]
            order = {owner: (self._held.rows[owner] > 1, self._held.part(owner)) for owner in self._held.rows}
            last = max(enumerate(ready), key=lambda at: (order[at[1].owner], at[0]))[1]
            self.preempt(last)
            if last is row:
                return False
        return True

    def _publish(self, row: Row) -> None:
        pages = self.pages[row.way]
        last = (row.length - 1) // PAGE * PAGE
        for i in range(row.published, last // PAGE):
            tokens_S = row.tokens(i * PAGE, (i + 1) * PAGE)
            before, row.node = row.node, pages.publish(row.node, row.pages[i], tokens_S)
            if row.mark and (i + 1) * PAGE == last > row.decoded_from and not (row.cut or row.job.overflowed):
                pages.keep_state(before, tokens_S, row.mark)

    def _remove(self, row: Row) -> None:
        self.copied(row)
        self._drop(row, row.pages)
        self.pages[row.way].states.drop([row.place, row.mark])
        row.pages, row.after, row.place, row.mark = [], None, 0, 0
        self.placed.remove(row)
        self._held.rows[row.owner] -= 1

    def _drop(self, row: Row, dropped: list[int]) -> None:
        pages = self.pages[row.way]
        before = pages.used
        pages.drop(dropped)
        self._held.pages[row.owner] += pages.used - before


def _last_full_page(count: int) -> int:
    """Return where the last page of `count` tokens ends that has another behind it."""
    return (count - 1) // PAGE * PAGE


def _planned(prefix: Prefix, count: int) -> int:
    """Return how many pages are computed for `count` tokens beside those that are known."""
    # Where the last known page is a partial one, the row goes on in a copy of it.
    return 0 if prefix.tokens % PAGE else -(-(count - prefix.tokens) // PAGE)


def _taken(row: Row, prefix: Prefix, count: int) -> int:
    """Return how many pages a row of `count` tokens takes beside those that are known."""
    return _planned(prefix, count) + row.job.decodes
