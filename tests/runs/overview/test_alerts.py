"""Does each alert ring for what it is for, and for nothing else?"""

from __future__ import annotations

import pytest

from jax_client.metrics.summary import CURVE, RECENT, Summary
from jax_client.runs.overview.alerts import alerts_of

NOW = 10_000.0


def trained(losses: list[float], *, every: float = 10.0, until: float = NOW, **more: float) -> Summary:
    summary = Summary()
    for place, loss in enumerate(losses, start=1):
        time = until - (len(losses) - place) * every
        summary.add_point("step", place, time, {"loss:sum": loss * 4, "tokens:sum": 4.0, **more})
    return summary


def kinds(summary: Summary, *, is_open: bool = True, now: float = NOW, free: float = 0.5) -> list[str]:
    return [alert.kind for alert in alerts_of(summary, is_open=is_open, now=now, free=free)]


def test_a_healthy_run_has_none() -> None:
    assert kinds(trained([3.0 - i / 100 for i in range(200)], **{"kl_sample_train:mean": 0.004})) == []
    assert kinds(Summary()) == []
    assert kinds(trained([5.0, 0.1])) == [], "two steps have no median"


def test_a_loss_over_three_times_its_median_rings_until_it_is_past() -> None:
    (alert,) = alerts_of(trained([1.0] * 50 + [3.1]), is_open=True, now=NOW)
    assert (alert.kind, alert.step) == ("loss", 51) and "3.1" in alert.text
    assert kinds(trained([1.0] * 50 + [2.9])) == []
    assert kinds(trained([1.0] * 50 + [9.0] + [1.0] * 5)) == []
    assert kinds(trained([-1.0] * 50 + [4.0])) == [], "the losses of RL are around zero"


def test_values_that_are_not_finite_ring() -> None:
    summary = trained([1.0] * 20)
    summary.add_point("step", 21, NOW, {"skipped_nonfinite:sum": 1.0})
    (alert,) = alerts_of(summary, is_open=False, now=NOW)
    assert (alert.kind, alert.step, alert.time) == ("nonfinite", 21, NOW) and "1 step was skipped" in alert.text
    summary = trained([1.0] * 20)
    summary.add_point("user", 20, NOW, {"nonfinite/reward": 2.0})
    assert "2 values were NaN" in alerts_of(summary, is_open=False, now=NOW)[0].text


@pytest.mark.parametrize(
    ("rewards", "rings"),
    [([0.0] * 10, True), ([0.3] + [1.0] * 10, True), ([0.0] * 9, False), ([0.5] * 20, False), ([0.0, 1.0] * 10, False)],
)
def test_a_flat_reward_rings(rewards: list[float], rings: bool) -> None:
    summary = Summary()
    for step, reward in enumerate(rewards):
        summary.add_point("user", step, NOW, {"env/all/reward/total": reward})
    assert kinds(summary) == (["reward"] if rings else [])


def test_the_gap_between_sampler_and_trainer_rings() -> None:
    assert kinds(trained([1.0] * 3, **{"kl_sample_train:mean": -0.02})) == ["kl"]


def test_silence_rings_only_in_an_open_run() -> None:
    quick = trained([1.0] * 20, until=NOW - 301)
    assert kinds(quick) == ["silent"] and kinds(quick, is_open=False) == []
    assert kinds(trained([1.0] * 20, until=NOW - 299)) == []
    # Twenty times the median step where steps are long.
    slow = trained([1.0] * 20, every=60.0, until=NOW - 1_100)
    assert kinds(slow) == [] and kinds(slow, now=NOW + 200) == ["silent"]
    quick.add_sign(NOW, "backward")
    assert kinds(quick) == [], "it compiles"


def test_a_run_that_is_loaded_again_was_not_silent_meanwhile() -> None:
    summary = trained([1.0] * 20, until=NOW - 36_000)
    summary.add_event("end", 20, NOW - 35_000, {"how": "unloaded"})
    summary.add_event("start", 20, NOW, {})
    summary = Summary.from_json(summary.to_json())
    assert kinds(summary) == [] and kinds(summary, now=NOW + 299) == []
    (alert,) = alerts_of(summary, is_open=True, now=NOW + 330)
    assert (alert.kind, alert.time) == ("silent", NOW) and "No step for 6 minutes" in alert.text
    # Its steps are as long as they were.
    slow = trained([1.0] * 20, every=60.0, until=NOW - 36_000)
    slow.add_event("start", 20, NOW, {})
    assert kinds(slow, now=NOW + 1_100) == [] and kinds(slow, now=NOW + 1_300) == ["silent"]


def test_a_clock_that_ran_ahead_hides_no_silence() -> None:
    summary = trained([1.0] * 20, until=NOW - 400)
    summary.add_point("step", 21, NOW + 3 * 3600, {})
    assert kinds(summary) == ["silent"]


def test_a_summary_of_an_earlier_version_is_read() -> None:
    fields = trained([1.0] * 20, until=NOW - 301).to_json()
    del fields["started"]
    assert kinds(Summary.from_json(fields)) == ["silent"]


def test_a_full_disk_rings_in_an_open_run() -> None:
    assert kinds(trained([1.0]), free=0.04) == ["disk"] and kinds(trained([1.0]), free=0.04, is_open=False) == []


def test_a_summary_stays_small_and_is_what_it_was_after_json() -> None:
    summary = trained([1 / (i + 1) for i in range(5_000)], **{"kl_sample_train:mean": 0.001})
    summary.add_event("end", 5_000, NOW, {"how": "closed", "text": "x" * 10_000})
    again = Summary.from_json(summary.to_json())
    assert again == summary and len(str(summary.to_json())) < 16_000
    assert len(summary.losses) == RECENT and len(summary.loss_curve.shown()) <= CURVE + 1
    assert summary.loss_curve.shown()[0] == 1.0 and summary.loss_curve.shown()[-1] == 1 / 5_000
    assert summary.tokens == 20_000
