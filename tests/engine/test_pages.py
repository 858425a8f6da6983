"""Are cache pages given out once, found by what they hold, and forgotten in the right order?"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_client.engine.sample.pages import PAGE, SCRATCH, Pages


def tokens(*values: int) -> np.ndarray:
    """Return the tokens of pages that each begin with one of `values`."""
    rows = np.zeros((len(values), PAGE), np.int32)
    rows[:, 0] = values
    return rows.ravel()


def followed(data: np.ndarray, *more: int) -> np.ndarray:
    return np.concatenate([data, np.array(more, np.int32)])


def store(pages: Pages, version: int, data: np.ndarray) -> list[int]:
    """Do what a row does: find, take the rest, publish, and go."""
    prefix = pages.find(version, data)
    missing = -(-(len(data) - prefix.tokens) // PAGE)
    taken = pages.take(missing)
    assert taken is not None
    node = prefix.node
    for i, page in enumerate(taken):
        start = prefix.tokens + i * PAGE
        node = pages.publish(node, page, data[start : start + PAGE])
    everything = [*prefix.pages, *taken]
    pages.drop(everything)
    return everything


def test_a_prefix_is_found_by_page() -> None:
    pages = Pages(10)
    first = store(pages, 1, tokens(1, 2, 3))
    found = pages.find(1, tokens(1, 2, 9))
    assert (found.pages, found.tokens) == (first[:2], 2 * PAGE)
    assert pages.find(2, tokens(1, 2, 3)).tokens == 0  # another version
    assert pages.find(1, tokens(2, 3)).tokens == 0  # the same pages after other ones are other pages


def test_a_partial_page_is_found_where_the_prompt_ends_with_it() -> None:
    pages = Pages(10)
    data = followed(tokens(1), 5, 6, 7)
    stored = store(pages, 0, data)
    assert pages.find(0, data).pages == stored
    longer = pages.find(0, followed(data, 8))
    assert (longer.pages, longer.tokens) == (stored[:1], PAGE)


def test_the_longest_unused_is_forgotten_first_and_leaves_before_what_leads_to_it() -> None:
    pages = Pages(5)
    a, b = store(pages, 0, tokens(1, 2)), store(pages, 0, tokens(7, 8))
    assert pages.take(1) == a[1:]  # the leaf of the older one
    assert pages.find(0, tokens(1, 2)).pages == a[:1]
    assert pages.find(0, tokens(7, 8)).pages == b
    assert pages.take(1) is None  # all are in use


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=30), st.integers(6, 12))
def test_no_page_is_given_twice(prompts: list[list[int]], count: int) -> None:
    """Rows come and go; pages in use are distinct, never the scratch page, and none is lost."""
    pages, rows = Pages(count), []
    contents: dict[int, list[int]] = {}
    for prompt in prompts:
        data = tokens(*prompt)
        prefix = pages.find(0, data)
        for i, page in enumerate(prefix.pages):
            assert contents[page] == data[: PAGE * (i + 1)].tolist()  # still what was stored there
        taken = pages.take(len(prompt) - len(prefix.pages))
        if taken is None:
            pages.drop(prefix.pages)
            if rows:
                pages.drop(rows.pop(0))
            continue
        used = {page for row in rows for page in row} | set(prefix.pages)
        assert not used & set(taken) and SCRATCH not in taken
        node = prefix.node
        for i, page in enumerate(taken):
            end = PAGE * (len(prefix.pages) + i + 1)
            node = pages.publish(node, page, data[end - PAGE : end])
            contents[page] = data[:end].tolist()
        rows.append([*prefix.pages, *taken])
    for row in rows:
        pages.drop(row)
    assert pages.available == count - 1
