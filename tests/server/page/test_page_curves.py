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

# The end of a curve: a spike at a step that has several points, within what is picked, and within what is drawn.
LAST = """
async () => {
  const { Curve } = await import("/dashboard/static/charts/pyramid.js");
  const { Points } = await import("/dashboard/static/charts/data.js");
  const { Chart } = await import("/dashboard/static/charts/chart.js");
  const { Group } = await import("/dashboard/static/charts/group.js");
  const step = [0, 1, 2, 2, 2, 2, 2], value = [1, 1, 1, 1, 1, 9, 1];
  const points = new Points("user"), group = new Group();
  points.append({ step, value });
  const chart = new Chart("evaluation", () => [{ label: "", points, index: 0 }], group);
  document.querySelector("main").append(chart.element);
  group.add(chart);
  group.drawNow();
  await new Promise((done) => requestAnimationFrame(done));
  return { picked: Curve.of(step, value).pick(0, 2, 100), drawn: [...chart.plot.series[1].idxs] };
}
"""

# A rare reward and a skewed one, thinned as the server does: each bucket's lowest and highest, and what they stand for.
THINNED = """
async () => {
  const { Points } = await import("/dashboard/static/charts/data.js");
  let seed = 1;
  const draw = () => (seed = (seed * 48271) % 2147483647) / 2147483647;
  const thinned = (values, from, to, size) => {
    const sent = { kind: "user", step: [], value: [], count: [], mean: [] }, chosen = new Set([from, to - 1]);
    for (let low = from; low < to; low += size) {
      const bucket = [...Array(Math.min(size, to - low)).keys()].map((i) => low + i);
      const sorted = [...bucket].sort((a, b) => values[a] - values[b]);
      chosen.add(sorted[0]);
      chosen.add(sorted.at(-1));
    }
    let before = from - 1;
    for (const i of [...chosen].sort((a, b) => a - b)) {
      const part = values.slice(before + 1, i + 1);
      sent.step.push(i);
      sent.value.push(values[i]);
      sent.count.push(part.length);
      sent.mean.push(part.reduce((a, b) => a + b, 0) / part.length);
      before = i;
    }
    return sent;
  };
  const found = {};
  for (const [name, one] of [["rare", () => (draw() < 0.02 ? 1 : 0)], ["skewed", () => Math.exp(3 * draw())]]) {
    const values = [...Array(12000)].map(one), whole = new Points("user");
    whole.append({ step: [...values.keys()], value: values });
    const parts = [thinned(values, 0, 9000, 20), thinned(values, 9000, 11000, 10),
      { step: [...Array(1000).keys()].map((i) => 11000 + i), value: values.slice(11000) }];
    const grown = new Points("user"), once = new Points("user");
    for (const part of parts) { grown.append(part); grown.mean("step", 0.9); }
    for (const part of parts) once.append(part);
    const length = once.curve("step").length, xs = once.curve("step").x;
    const [all, some, drawn] = [whole.mean("step", 0.9), grown.mean("step", 0.9), once.mean("step", 0.9)];
    const mean = (list) => list.reduce((a, b) => a + b, 0) / list.length;
    const at = [...Array(length).keys()];
    const raw = mean(at.map((i) => once.curve("step").y[i])) - mean(at.map((i) => all[xs[i]]));
    found[name] = { points: length, raw, same: at.every((i) => some[i] === drawn[i]),
      bias: mean(at.map((i) => drawn[i] - all[xs[i]])), level: mean([...all].slice(0, 12000)),
      worst: Math.max(...at.filter((i) => xs[i] >= 11100).map((i) => Math.abs(drawn[i] - all[xs[i]]))) };
  }
  return found;
}
"""

# A value that is none, in a thinned series: what its point stands for is left to the next.
GAPS = """
async () => {
  const { Points } = await import("/dashboard/static/charts/data.js");
  const points = new Points("user");
  points.append({ step: [0, 1], value: [1, null] });
  points.append({ step: [4, 6], value: [null, 5], count: [2, 2], mean: [3, 4] });
  const curve = points.curve("step");
  return { x: [...curve.x.slice(0, curve.length)], count: [...curve.stands.count.slice(0, curve.length)],
    mean: [...curve.stands.mean.slice(0, curve.length)], smooth: [...points.mean("step", 0.5)].slice(0, curve.length) };
}
"""

# `refine` with what came since its points were asked for, of logs with and without times, and what comes again.
REFINED = """
async () => {
  const { RunData } = await import("/dashboard/static/charts/data.js");
  const found = {};
  for (const [name, time] of [["times", (i) => 1000 + i], ["none", () => null]]) {
    const part = (from, to, by = 1) => {
      const at = [];
      for (let i = from; i < to; i += by) at.push(i);
      const value = at.map((i) => i % 7);
      return { series: { loss: { kind: "user", step: at, time: at.map(time), tokens: [], value } } };
    };
    const steps = (data) => data.series.get("loss").step;
    const right = (data, end) => steps(data).length === end && steps(data).every((step, i) => step === i);
    const [late, early, reset] = ["a", "b", "c"].map((run) => new RunData(run));
    // Two points came before the finer answer, which has not got them.
    late.take(part(0, 100, 3));
    const asked = late.asking();
    late.take(part(100, 102));
    late.refine(part(0, 100), asked);
    late.take(part(102, 104));
    // The finer answer has two points that come after it.
    early.take(part(0, 100, 3));
    early.refine(part(0, 102), early.asking());
    early.take(part(100, 102));
    early.take(part(102, 104));
    // The log was begun anew meanwhile: the finer points are of one that is gone.
    reset.take(part(0, 100, 3));
    const before = reset.asking();
    reset.take({ ...part(0, 5), reset: true });
    reset.refine(part(0, 100), before);
    found[name] = [right(late, 104), right(early, 104), right(reset, 5)];
  }
  return found;
}
"""

EVERY = """
async (run) => {
  const { everyPoint } = await import("/dashboard/static/core/api.js");
  const { step, time, value } = await everyPoint(run, "loss");
  return { step: step.map(String), time: time.map(String), value };
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


def test_several_points_at_the_last_step_are_drawn(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url) as page:
        page.wait_for_selector("table.runs tbody tr")
        assert page.evaluate(LAST) == {"picked": [0, 1, 2, 3, 4, 5, 6], "drawn": [0, 6]}


def test_the_mean_of_thinned_points_is_that_of_all(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url) as page:
        for found in page.evaluate(THINNED).values():
            assert found["points"] < 3000 and found["same"]
            # The points that are drawn lie far from the mean; their mean does not.
            assert found["raw"] > 0.15 * found["level"] and abs(found["bias"]) < 0.03 * found["level"]
            # The end is not thinned.
            assert found["worst"] < 0.01 * found["level"]


def test_a_point_without_a_value_leaves_its_count_to_the_next(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url) as page:
        found = page.evaluate(GAPS)
        assert (found["x"], found["count"], found["mean"]) == ([0, 6], [1, 4], [1, 3.5])
        # One, then three of mean three, then five.
        assert found["smooth"] == pytest.approx([1, ((0.5 / 8 + 3 * (1 - 1 / 8)) / 2 + 2.5) / (1 - 0.5**5)])


def test_finer_points_lose_none_and_double_none(chromium: Browser, fake: FakeDashboard) -> None:
    with opened(chromium, fake.url) as page:
        assert page.evaluate(REFINED) == {"times": [True] * 3, "none": [True] * 3}


def test_all_points_of_a_log_without_times_are_read(chromium: Browser, fake: FakeDashboard) -> None:
    fake.csv["log:gsm8k"] = (
        "kind,step,time,tokens,loss\r\nuser,0,,,1.5\r\nuser,,7.5,,2.5\r\nuser,,,,3.5\r\nuser,3,,,\r\n"
    )
    expected = {"step": ["0", "NaN"], "time": ["NaN", "7.5"], "value": [1.5, 2.5]}
    with opened(chromium, fake.url) as page:
        assert page.evaluate(EVERY, "log:gsm8k") == expected
