"""Does thinning keep what an eye would see? The page's own module, against a walk over all points."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.page.browser import opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from support.page.fake_server import FakeDashboard

pytestmark = pytest.mark.full

# Curves of many lengths, grown point by point, some with gaps and repeated x; ranges inside, across and beyond them.
PICKS = """
async () => {
  const { Curve } = await import("/dashboard/static/charts/pyramid.js");
  let seed = 1;
  const draw = () => (seed = (seed * 48271) % 2147483647) / 2147483647;
  const wrong = [];
  let checked = 0;
  for (const length of [0, 1, 2, 7, 8, 9, 31, 33, 500, 4097, 60001]) {
    const xs = [], ys = [];
    for (let i = 0, x = 0; i < length; i++) {
      x += draw() < 0.1 ? 0 : draw() < 0.02 ? 500 : 1;
      xs.push(x);
      ys.push(draw() - 0.5 + (draw() < 0.002 ? 50 : 0));
    }
    const curve = Curve.of(xs, ys);
    for (let trial = 0; trial < 60; trial++) {
      const bins = 4 + Math.floor(draw() * 900);
      const end = xs.at(-1) ?? 1;
      const low = (draw() * 1.4 - 0.2) * end, high = low + draw() * (trial % 2 ? end : end / 50);
      const picked = curve.pick(low, high, bins);
      const inside = xs.map((x, i) => i).filter((i) => xs[i] >= low && xs[i] <= high);
      const values = picked.map((i) => ys[i]);
      const fine = picked.length <= 2 * bins && picked.every((i, k) => !k || i > picked[k - 1]) &&
        (!inside.length || (Math.min(...values) <= Math.min(...inside.map((i) => ys[i])) &&
          Math.max(...values) >= Math.max(...inside.map((i) => ys[i])) &&
          xs[picked[0]] <= xs[inside[0]] && xs[picked.at(-1)] >= xs[inside.at(-1)]));
      checked++;
      if (!fine) wrong.push([length, bins, low, high, picked.length, inside.length]);
    }
  }
  return { checked, wrong: wrong.slice(0, 3) };
}
"""

ORDER = """
async () => {
  const { Curve, smoothed } = await import("/dashboard/static/charts/pyramid.js");
  const curve = Curve.of([3, 1, 2, NaN, 5], [30, 10, 20, 40, NaN]);
  const once = smoothed([1, 2, 3, 4], 4, 0.5).y;
  const part = smoothed([1, 2, 3, 4], 2, 0.5);
  return { x: [...curve.x.slice(0, curve.length)], y: [...curve.y.slice(0, curve.length)],
    once: [...once], twice: [...smoothed([1, 2, 3, 4], 4, 0.5, part).y].slice(0, 4) };
}
"""


def test_picked_points_have_the_extremes(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url) as page:
        assert page.evaluate(PICKS) == {"checked": 660, "wrong": []}


def test_points_are_sorted_and_means_are_unbiased(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url) as page:
        found = page.evaluate(ORDER)
        assert (found["x"], found["y"]) == ([1, 2, 3], [10, 20, 30])
        assert found["once"] == pytest.approx([1, 5 / 3, 17 / 7, 49 / 15]) and found["twice"] == found["once"]
