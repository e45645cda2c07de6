"""From figures and links to the plan of a round."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.coordinator.domain import (
    Candidate,
    DepthBlock,
    DeviceFigures,
    LinkFigures,
    PlannedPart,
    PlanRequest,
    PlanSettings,
    RoundPlan,
)
from fleetune.coordinator.rounds import planning, timing

LAYOUTS: tuple[Any, ...] = ("blocks", "depth", "data-parallel", "single", "auto")


def blocks(layers: int, head: bool = True) -> tuple[DepthBlock, ...]:
    found = [DepthBlock(f"layer.{layer}", (f"layer.{layer}.a", f"layer.{layer}.b"), 1000) for layer in range(layers - 1, -1, -1)]
    return tuple([DepthBlock("head", ("head.weight",), 5000)] if head else []) + tuple(found)


def device(number: int, link: LinkFigures | None = None) -> Candidate:
    return Candidate(f"id-{number}", f"device {number}", link=link or LinkFigures(1e6, 1e7, 0.02, "measured"))


def told(speed: float, depths: int, held: int | None = None, **changes: Any) -> DeviceFigures:
    """`speed` seconds for the first depth, a tenth more for each further one; memory for `held` depths."""
    made = DeviceFigures(
        8,
        tuple(speed * (1 + 0.1 * depth) for depth in range(depths)),
        tuple((depth + 1) << 20 for depth in range(depths)),
        100 << 20,
        0 if held is None else (100 + held) << 20,
    )
    return replace(made, **changes)


def request(speeds: list[float], layers: int = 3, held: list[int | None] | None = None, head: bool = False, **changes: Any) -> PlanRequest:
    table = blocks(layers, head)
    candidates = tuple(device(number) for number in range(len(speeds)))
    memory = held or [None] * len(speeds)
    figures = {c.device_id: told(speed, len(table), have) for c, speed, have in zip(candidates, speeds, memory, strict=True)}
    fields: dict[str, Any] = {"settings": PlanSettings(rows=8), "extra_s": {}, "untrained_rounds": (0,) * len(table), **changes}
    return PlanRequest(round_number=1, seed=0, blocks=table, state_bytes=100_000, candidates=candidates, figures=figures, **fields)


def planned(asked: PlanRequest) -> RoundPlan:
    made = planning.plan_round(asked)
    assert isinstance(made, RoundPlan), made
    return made


# ---------------------------------------------------------------------------------------------------------------- properties

_seconds = st.floats(0.01, 100.0)
_links = st.builds(
    LinkFigures,
    st.sampled_from([0.0, 1e5, 1e6, 3e7]),
    st.sampled_from([0.0, 1e6, 1e8]),
    st.sampled_from([0.0, 0.05]),
)


@st.composite
def requests(draw: st.DrawFn) -> PlanRequest:
    layers, head = draw(st.integers(1, 5)), draw(st.booleans())
    table = blocks(layers, head)
    count = draw(st.integers(0, 7))
    candidates = tuple(device(number, draw(_links)) for number in range(count))
    figures = {
        c.device_id: told(draw(_seconds), len(table), draw(st.one_of(st.none(), st.integers(0, len(table)))), margin=draw(st.floats(1, 2)))
        for c in candidates
        if draw(st.integers(0, 9))
    }
    made = PlanSettings(
        layout=draw(st.sampled_from(LAYOUTS)),
        solver=draw(st.sampled_from(["exact", "crunch-equal", "dual", "random-equal", "greedy-equal"])),
        layers_per_block=draw(st.integers(1, 3)),
        resource=draw(st.sampled_from(["ingress", "airtime"])),
        uplink_bits_per_s=draw(st.sampled_from([0.0, 1e6, 1e9])),
        rotate_rounds=draw(st.integers(0, 2)),
        passes=draw(st.integers(1, 3)),
        rows=draw(st.sampled_from([4, 8, 16])),
    )
    waited = tuple(draw(st.integers(0, 4)) for _ in table)
    turns = tuple({depth: f"id-{draw(st.integers(0, 6))}" for depth in range(1, len(table) + 1)} for _ in range(draw(st.integers(0, 2))))
    extra = {c.device_id: draw(st.floats(0, 5)) for c in candidates if draw(st.booleans())}
    return PlanRequest(made, draw(st.integers(1, 9)), 3, table, 100_000, candidates, figures, extra, waited, turns)


@settings(max_examples=150, deadline=None)
@given(asked=requests())
def test_a_plan_can_be_carried_out(asked: PlanRequest) -> None:
    made = planning.plan_round(asked)
    assert made == planning.plan_round(asked), "the same request gives the same plan"
    assert made == planning.plan_round(replace(asked, candidates=asked.candidates[::-1])), "whoever registered first"
    if isinstance(made, str):
        assert made
        return
    depth_count = len(asked.blocks)
    rates = timing.up_rates([c for c in asked.candidates if c.device_id in asked.figures])
    links = {c.device_id: c.link for c in asked.candidates}
    devices = [part.device_id for part in made.parts]
    assert devices
    assert len(set(devices)) == len(devices), "each device has one part"
    assert not set(devices) & set(made.idle_devices)
    assert {*devices, *made.idle_devices} == set(asked.figures)
    assert made.depths() == set(range(1, depth_count + 1)) - set(made.uncovered_depths)
    shared = asked.settings.resource == "airtime" or asked.settings.uplink_bits_per_s > 0
    total = 1.0 if asked.settings.resource == "airtime" else asked.settings.uplink_bits_per_s
    if shared:
        assert math.fsum(part.share for part in made.parts) <= total * (1 + 1e-12), "no more than there is"
    for part in made.parts:
        figures = asked.figures[part.device_id]
        assert timing.fits(figures, part.depths[-1]), "memory is never exceeded"
        assert list(part.depths) == sorted(set(part.depths))
        if made.layout == "depth":
            assert part.depths == tuple(range(1, len(part.depths) + 1)), "from the loss down"
        if made.layout == "data-parallel":
            assert len(part.depths) == depth_count
        extra_s = asked.extra_s.get(part.device_id, 0.0)
        ready = timing.ready_s(figures, links[part.device_id], part.depths[-1], asked.settings, asked.state_bytes, extra_s)
        assert part.ready_s == pytest.approx(ready)
        rate = part.uplink_bits_per_s or rates[part.device_id]
        assert (part.uplink_bits_per_s > 0) == shared
        assert rate <= rates[part.device_id] * (1 + 1e-9), "never more than its own link carries"
        bits = math.fsum(timing.payload_bits(asked.blocks[depth - 1], asked.settings) for depth in part.depths)
        assert part.finish_s == pytest.approx(part.ready_s + bits / rate)
        assert part.finish_s <= made.round_s
    if made.layout == "blocks":
        assert len({depth for part in made.parts for depth in part.depths}) == sum(len(part.depths) for part in made.parts), "once each"
    if made.lower_bound_s is not None:
        assert made.lower_bound_s <= made.round_s * (1 + 1e-9)


@settings(max_examples=80, deadline=None)
@given(asked=requests())
def test_auto_is_as_good_as_the_best_of_the_four(asked: PlanRequest) -> None:
    auto = planning.plan_round(replace(asked, settings=replace(asked.settings, layout="auto")))
    four = {layout: planning.plan_round(replace(asked, settings=replace(asked.settings, layout=layout))) for layout in planning.LAYOUTS}
    plans = [plan for plan in four.values() if isinstance(plan, RoundPlan)]
    if isinstance(auto, str):
        assert not plans
        return
    fewest = min(len(plan.uncovered_depths) for plan in plans)
    assert len(auto.uncovered_depths) == fewest
    best = min(planning.seconds_per_row(plan, asked) for plan in plans if len(plan.uncovered_depths) == fewest)
    assert planning.seconds_per_row(auto, asked) <= best * planning.AS_GOOD
    assert [name for name, _, _ in auto.predictions] == list(planning.LAYOUTS)
    assert all((round_s is None) == isinstance(four[name], str) for name, round_s, _ in auto.predictions)  # type: ignore[index]
    assert auto.layout in auto.reason


# ------------------------------------------------------------------------------------------------------------------ one by one


def test_the_deepest_block_goes_to_who_reaches_it() -> None:
    made = planned(request([1.0, 1.0, 1.0], held=[1, 2, 3]))
    assert {part.device_id: part.depths for part in made.parts} == {"id-0": (1,), "id-1": (2,), "id-2": (3,)}


def test_where_uploads_share_nothing_nobody_is_held_back() -> None:
    made = planned(request([1.0, 2.0, 3.0]))
    assert [part.uplink_bits_per_s for part in made.parts] == [0.0] * 3
    assert made.lower_bound_s is None
    bits = timing.payload_bits(blocks(3, head=False)[0], PlanSettings())
    assert all(part.finish_s - part.ready_s == pytest.approx(bits / 1e6) for part in made.parts)


def test_download_computing_and_lateness_come_before_the_upload() -> None:
    asked = request([2.0], layers=1, settings=PlanSettings(rows=16, passes=3), extra_s={"id-0": 5.0})
    asked = replace(asked, figures={"id-0": replace(asked.figures["id-0"], margin=1.5)})
    (part,) = planned(asked).parts
    assert part.ready_s == pytest.approx(100_000 * 8 / 1e7 + 0.02 + 2.0 * 3 * (16 / 8) * 1.5 + 5.0)


def test_neighbouring_layers_go_together_and_the_head_alone() -> None:
    assert timing.groups(blocks(5), 2) == ((1,), (2, 3), (4, 5), (6,))
    assert timing.groups(blocks(4, head=False), 3) == ((1, 2, 3), (4,))
    made = planned(request([1.0] * 3, layers=4, head=True, settings=PlanSettings(rows=8, layers_per_block=2)))
    assert [part.depths for part in made.parts] == [(1,), (2, 3), (4, 5)]


def test_blocks_that_have_waited_come_first_where_devices_are_few() -> None:
    made = planned(request([1.0], untrained_rounds=(0, 3, 1)))
    assert [part.depths for part in made.parts] == [(2,)]
    assert made.uncovered_depths == (1, 3)


def test_rotation_keeps_last_rounds_pairs_apart() -> None:
    free = planned(request([1.0, 2.0, 4.0]))
    pairs = {part.depths[0]: part.device_id for part in free.parts}
    turned = planned(request([1.0, 2.0, 4.0], settings=PlanSettings(rows=8, rotate_rounds=1), turns=(pairs,)))
    assert turned.rounds_avoided == 1
    assert not {(part.depths[0], part.device_id) for part in turned.parts} & set(pairs.items())


def test_depth_takes_the_small_ones_as_deep_as_they_go() -> None:
    made = planned(request([1.0, 1.0, 1.0], held=[1, 2, 3], settings=PlanSettings(layout="depth", rows=8)))
    assert {part.device_id: len(part.depths) for part in made.parts} == {"id-0": 1, "id-1": 2, "id-2": 3}


def test_a_device_without_figures_or_with_those_of_another_model_takes_no_part() -> None:
    asked = request([1.0, 1.0, 1.0], layers=2)
    figures = {"id-0": asked.figures["id-0"], "id-1": told(1.0, 7)}
    assert [part.device_id for part in planned(replace(asked, figures=figures)).parts] == ["id-0"]
    assert planning.plan_round(replace(asked, figures={})) == "no device has told how fast it trains this model"


def test_why_there_is_no_plan_is_told_in_words() -> None:
    asked = request([1.0, 1.0], held=[0, 0])
    for layout in LAYOUTS:
        why = planning.plan_round(replace(asked, settings=PlanSettings(layout=layout, rows=8)))
        assert isinstance(why, str)
        assert "memory" in why
        assert "of the 100 MiB that its training may take" in why
    whole = planning.plan_round(request([1.0, 1.0], held=[2, 1], settings=PlanSettings(layout="data-parallel", rows=8)))
    assert whole == (
        "no device has memory for the whole model: device 0 comes nearest, and needs 103 MiB of the 102 MiB that its training may take"
    )


def test_auto_takes_the_simplest_of_those_that_are_as_good() -> None:
    made = planned(request([1.0], settings=PlanSettings(layout="auto", rows=8)))
    assert made.layout == "single"
    crowd = planned(request([1.0] * 6, settings=PlanSettings(layout="auto", rows=8)))
    assert crowd.layout == "data-parallel"
    assert "data-parallel takes least time for a row's full gradient" in crowd.reason


# ---------------------------------------------------------------------------------------------------------------------- noise


def really_s(plan: RoundPlan, asked: PlanRequest) -> float:
    """When the round would end by these figures and links, with the shares of the plan."""
    total = 0.0
    for part in plan.parts:
        link = next(c.link for c in asked.candidates if c.device_id == part.device_id)
        ready = timing.ready_s(asked.figures[part.device_id], link, part.depths[-1], asked.settings, asked.state_bytes)
        bits = math.fsum(timing.payload_bits(asked.blocks[depth - 1], asked.settings) for depth in part.depths)
        total = max(total, ready + bits / (part.share * link.up_bits_per_s))
    return total


@pytest.mark.parametrize("layout", ["blocks", "data-parallel", "single"])
def test_figures_and_links_that_are_off_by_a_fifth_cost_no_more_than_they_must(layout: Any) -> None:
    """A plan by noisy figures is never longer than 1.2 / 0.8 of the best by the true ones, and mostly far less."""
    random = Random(4)
    lost: list[float] = []
    for _ in range(25):
        speeds = [random.uniform(1.0, 4.0) for _ in range(7)]
        settings = PlanSettings(layout=layout, rows=8, resource="airtime")
        true = request(speeds, layers=5, settings=settings)
        links = [LinkFigures(random.uniform(1e5, 4e5)) for _ in speeds]
        true = replace(true, candidates=tuple(device(number, link) for number, link in enumerate(links)))

        def off() -> float:
            return random.uniform(0.8, 1.2)

        noisy = replace(
            true,
            candidates=tuple(replace(c, link=LinkFigures(c.link.up_bits_per_s / off())) for c in true.candidates),
            figures={name: told_of(known, off()) for name, known in true.figures.items()},
        )
        best, got = planned(true), planned(noisy)
        assert really_s(best, true) == pytest.approx(best.round_s)
        lost.append(really_s(got, true) / best.round_s)
    assert max(lost) <= 1.2 / 0.8
    assert sum(lost) / len(lost) < 1.2


def told_of(known: DeviceFigures, off: float) -> DeviceFigures:
    return replace(known, step_s=tuple(value * off for value in known.step_s))


# ------------------------------------------------------------------------------------------------------------------- takeover


PART = PlannedPart("id-0", (1, 2), 0.5, 5e5, 3.0, 5.0)


def take_over(**changes: Any) -> PlannedPart | None:
    fields: dict[str, Any] = {
        "candidates": [device(1), device(2)],
        "figures": {"id-1": told(2.0, 3), "id-2": told(1.0, 3)},
        "extra_s": {},
        "bits": 1e6,
        "settings": PlanSettings(rows=8),
        "state_bytes": 100_000,
        "elapsed_s": 10.0,
        "until_s": 0.0,
        **changes,
    }
    return timing.taken_over(PART, **fields)


def test_the_spare_that_is_done_first_takes_over_at_the_rate_of_the_part() -> None:
    found = take_over()
    assert found is not None
    assert (found.device_id, found.depths, found.uplink_bits_per_s) == ("id-2", (1, 2), 5e5)
    assert found.ready_s == pytest.approx(10.0 + 0.1 + 1.1)
    assert found.finish_s == pytest.approx(found.ready_s + 2.0)


def test_nobody_takes_over_who_would_be_late_or_has_no_memory_or_is_not_known() -> None:
    assert take_over(until_s=13.0) is None
    assert take_over(until_s=13.5) is not None
    assert take_over(figures={"id-1": told(2.0, 3, held=1)}) is None
    assert take_over(figures={}) is None
    assert take_over(candidates=[]) is None


@given(failed=st.integers(0, 4), room=st.sampled_from([0, 100, 104, 10**6]), flat=st.booleans())
def test_what_did_not_fit_fits_no_more_and_what_did_still_does(failed: int, room: int, flat: bool) -> None:
    figures = told(1.0, 4, room_bytes=room << 20, step_bytes=(1 << 20,) * 4 if flat else tuple(depth << 20 for depth in range(1, 5)))
    short = timing.short_of(figures, failed)
    for depth in range(1, 5):
        assert timing.fits(short, depth) == (timing.fits(figures, depth) and (not failed or depth < failed))
    assert list(short.step_bytes) == sorted(short.step_bytes)


def test_lateness_is_a_moving_average_that_never_falls_below_nothing() -> None:
    assert timing.later_by(0.0, 10.0, 14.0) == pytest.approx(0.3 * 4)
    assert timing.later_by(2.0, 12.0, 12.0) == pytest.approx(2.0)
    assert timing.later_by(1.0, 10.0, 1.0) == 0.0
    assert timing.later_by(1.5, 10.0, 0.0) == 1.5, "not seen"


def test_figures_that_are_far_off_twice_in_a_row_are_not_believed_any_more() -> None:
    after_one = timing.later_by(0.0, 10.0, 110.0)
    assert after_one == pytest.approx(30.0), "it may have been a stall"
    assert timing.later_by(after_one, 40.0, 12.0) == pytest.approx(0.7 * 30 + 0.3 * 2), "and was one"
    assert timing.later_by(after_one, 40.0, 110.0) == pytest.approx(100.0), "it was none"
    assert timing.later_by(2.0, 12.0, 110.0) == pytest.approx(0.7 * 2 + 0.3 * 100), "what is usual is not far off"


def test_an_unknown_uplink_is_taken_for_the_usual_one() -> None:
    links = [LinkFigures(up) for up in (1e6, 3e6, 2e6, 0.0)]
    rates = timing.up_rates([device(number, link) for number, link in enumerate(links)])
    assert rates == {"id-0": 1e6, "id-1": 3e6, "id-2": 2e6, "id-3": 2e6}
    assert timing.up_rates([device(0, LinkFigures())]) == {"id-0": timing.UNKNOWN_UP_BITS_PER_S}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_devices_say_of_no_time_at_all_does_no_harm(layout: Any) -> None:
    asked = request([1e-9, 1e-9, 1e-9], settings=PlanSettings(layout=layout, rows=8), layers=2)
    asked = replace(asked, candidates=tuple(replace(c, link=LinkFigures(1e15, 1e15)) for c in asked.candidates))
    made = planned(asked)
    assert made.round_s > 0
