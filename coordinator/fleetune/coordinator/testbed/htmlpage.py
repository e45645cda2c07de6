"""The report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere; light and dark."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence

from fleetune.coordinator.figures import bytes_text, count_text, duration_text, metric_text
from fleetune.coordinator.testbed.curve import COST_WORDS, cost_text, curve
from fleetune.coordinator.testbed.drawing import safe
from fleetune.coordinator.testbed.lanes import Activity
from fleetune.coordinator.testbed.records import Record
from fleetune.coordinator.testbed.runfigures import COSTS, UNFINISHED, Cost, DeviceFigures, Robustness, RunFigures
from fleetune.coordinator.testbed.timeline import FAULT_WORDS, WORDS, timeline

Cells = Sequence[str]

_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1f2328;--soft:#59636e;--line:#d1d9e0;--card:#f6f8fa}
:root{--accent:#0072b2;--good:#116329;--bad:#a13300}
@media(prefers-color-scheme:dark){
:root{--paper:#0d1117;--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--card:#151b23}
:root{--accent:#58a6e0;--good:#56d364;--bad:#ff8a4c}
}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:28px 24px 60px;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{font-size:26px;line-height:1.25;margin:0 0 4px}
h2{font-size:19px;margin:40px 0 6px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:15px;margin:22px 0 6px}
p{margin:6px 0 12px;max-width:78ch}
.soft{color:var(--soft)}
.good{color:var(--good)}
.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px;margin:20px 0 8px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.tile b{display:block;font-size:22px;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}
.wide{overflow-x:auto;margin:8px 0 14px}
.wide>svg{display:block;width:100%;min-width:860px;height:auto}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:16px;margin:12px 0}
.curves svg{width:100%;height:auto;border:1px solid var(--line);border-radius:8px;padding:8px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:5px 18px 5px 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:500}
thead th{vertical-align:bottom}
th:first-child,td:first-child,.words{text-align:left}
td.words:last-child{white-space:normal;min-width:16em;overflow-wrap:anywhere}
details{margin:10px 0}
summary{cursor:pointer;color:var(--accent)}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;overflow-x:auto}
pre{font:13px/1.45 ui-monospace,monospace}
dt{font-weight:600;margin-top:10px}
dd{margin:0 0 0 1.2em;max-width:78ch}
ul{padding-left:1.3em;max-width:90ch}
@media print{body{max-width:none}details{display:none}}
"""

_ACTIVITY_HEADS: tuple[tuple[str, tuple[Activity, ...]], ...] = (
    ("computes", ("compute",)),
    ("uploads", ("upload",)),
    ("downloads", ("download",)),
    ("measures", ("measure",)),
    ("loads", ("load",)),
    ("evaluates", ("evaluate",)),
    ("idle", ("idle",)),
    ("paused", ("paused",)),
    ("down", ("down",)),
    ("not known", ("unknown",)),
)


def page(figures: RunFigures, record: Record) -> str:
    """The whole document."""
    name = figures.testbed or "testbed"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>',
        f"<title>{safe(f'{name}: {figures.status}')}</title><style>{_STYLE}</style></head><body>",
        *_head(figures, record),
        *_notes(figures),
        "<h2>Time line</h2>",
        f'<div class="wide">{timeline(figures)}</div>',
        *_quality(figures),
        *_targets(figures),
        *_robustness(figures),
        *_rounds(figures),
        *_devices(figures),
        *_about(record),
        "</body></html>",
        "",
    ]
    return "\n".join(parts)


def _head(figures: RunFigures, record: Record) -> Iterable[str]:
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(figures.began_unix_s))
    yield f"<h1>{safe(figures.testbed or 'Testbed')}</h1>"
    about = [
        f"job {figures.job} ({figures.job_id})" if figures.job else f"job {figures.job_id}",
        figures.method,
        "/".join(figures.base.rstrip("/").split("/")[-2:]),
        f"backend {figures.backend}",
        when,
    ]
    yield f'<p class="soft">{safe(" · ".join(part for part in about if part))}</p>'
    tone = "good" if figures.status == "completed" else "bad"
    ending = f": {figures.message}" if figures.message else ""
    yield f'<p><strong class="{tone}">{safe(figures.status)}</strong>{safe(ending)}</p>'
    yield '<div class="tiles">'
    for value, words in _tiles(figures):
        yield f'<div class="tile"><b>{safe(value)}</b><span>{safe(words)}</span></div>'
    yield "</div>"


def _tiles(figures: RunFigures) -> Iterable[tuple[str, str]]:
    """What is known at a glance; what is not known has no tile."""
    robust = figures.robustness
    if robust.final_value is not None:
        before = "" if robust.first_value is None else f", {metric_text(figures.metric, robust.first_value)} before"
        yield metric_text(figures.metric, robust.final_value), f"{_metric_name(figures)} at the end{before}"
    if figures.status != UNFINISHED:
        yield f"{robust.rounds_committed} of {robust.rounds_asked}", f"rounds committed, {robust.rounds_on_time} on time"
    shown: tuple[Cost, ...] = ("wall_s", _bytes(figures), "cpu_s", "energy_j")
    for cost in shown:
        if figures.spent[cost] is not None:
            yield cost_text(cost, figures.spent[cost]), COST_WORDS[cost]
    refused = f", {robust.faults_not_made} could not be made" if robust.faults_not_made else ""
    yield str(sum(robust.faults_made.values())), f"faults made, {robust.faults_undone} undone again{refused}"
    if robust.violations is not None:
        yield str(len(robust.violations)), "broken promises in the history"


def _bytes(figures: RunFigures) -> Cost:
    """What is on the wire where that was counted, else the updates alone."""
    return "sent_bytes" if figures.spent["sent_bytes"] is not None else "upload_bytes"


def _metric_name(figures: RunFigures) -> str:
    return figures.metric.replace("_", " ")


def _notes(figures: RunFigures) -> Iterable[str]:
    if figures.notes:
        yield "<ul>" + "".join(f"<li>{safe(note)}</li>" for note in figures.notes) + "</ul>"


# --- quality and cost


def _quality(figures: RunFigures) -> Iterable[str]:
    yield "<h2>Quality-under-Budget</h2>"
    if not figures.points:
        yield '<p class="soft">No round was measured.</p>'
        return
    yield (
        f"<p>The best {safe(_metric_name(figures))} among the rounds that were committed before a budget was spent. Spent is what "
        "all devices together used since the run began, lost work included. Each dot is a round, the line is the best so far.</p>"
    )
    pictures = [curve(figures, cost) for cost in COSTS if cost != "upload_bytes" or figures.spent["sent_bytes"] is None]
    if any(pictures):
        yield f'<div class="curves">{"".join(pictures)}</div>'
    for cost in COSTS:
        found = [quality for quality in figures.qualities if quality.cost == cost]
        if not found:
            continue
        heads = [cost_text(cost, item.budget) + (" (all)" if item.whole else "") for item in found]
        cells = ["-" if item.value is None else metric_text(figures.metric, item.value) for item in found]
        yield _table([COST_WORDS[cost], *heads], [[_metric_name(figures), *cells]])
    if figures.spent["energy_j"] is None:
        yield '<p class="soft">Energy: not every device can tell its own, so there is no budget of it.</p>'


def _targets(figures: RunFigures) -> Iterable[str]:
    yield "<h2>Cost-to-Target</h2>"
    if not figures.targets:
        yield '<p class="soft">No round was measured.</p>'
        return
    yield "<p>What had been spent when a committed round first reached a level.</p>"
    shown: list[Cost] = [cost for cost in COSTS if figures.spent[cost] is not None]
    rows: list[Cells] = []
    for target in figures.targets:
        level = metric_text(figures.metric, target.level)
        name = target.name if target.name.rstrip("%").isdecimal() else f"{target.name} ({level})"
        if target.costs is None:
            rows.append([name, "not reached", *("-" for _ in shown)])
        else:
            rows.append([name, str(target.round_number), *(cost_text(cost, target.costs[cost]) for cost in shown)])
    yield _table([_metric_name(figures), "round", *(COST_WORDS[cost] for cost in shown)], rows)


# --- robustness


def _robustness(figures: RunFigures) -> Iterable[str]:
    robust = figures.robustness
    yield "<h2>Robustness</h2>"
    told: list[Cells] = [
        ["rounds committed", f"{robust.rounds_committed} of {robust.rounds_asked}"],
        ["of these on time", _part(robust.rounds_on_time, robust.rounds_asked), robust.due],
        ["of these with every device", _part(robust.rounds_whole, robust.rounds_asked)],
        ["device tasks done", _part(robust.tasks_done, robust.tasks_asked), "training in committed rounds"],
        ["failed, by a named failure", str(robust.tasks_failed)],
        ["lost", str(robust.tasks_lost), "not back when their round closed, or their device had gone"],
        ["refused", str(robust.tasks_refused)],
        ["late", str(robust.tasks_late), "came after their round had closed"],
        ["trained again", str(robust.tasks_retrained), "within a round, as what had been trained was lost"],
    ]
    if figures.status == UNFINISHED:
        told = []  # only the job's end tells them
    rows: list[Cells] = [
        *told,
        ["processes killed for lack of memory", str(robust.out_of_memory_kills), "by the kernel, in all members"],
        ["back at work after a fault", *_back_words(robust)],
        ["broken promises in the history", "not looked at" if robust.violations is None else str(len(robust.violations))],
    ]
    yield _table(["", "", ""], [[*row, *[""] * (3 - len(row))] for row in rows], words=(2,), head=False)
    if robust.violations:
        yield "<ul>" + "".join(f'<li class="bad">{safe(item)}</li>' for item in robust.violations) + "</ul>"
    if robust.recoveries:
        yield "<h3>Faults</h3>"
        yield _table(
            ["fault", "on", "at", "in round", "which then", "lasted", "back after", "what was done"],
            [
                [
                    FAULT_WORDS.get(item.fault.kind, item.fault.kind),
                    item.fault.member,
                    f"{item.fault.begin_s:.1f} s",
                    str(item.round_number or "-"),
                    WORDS[item.was_at],
                    _lasted(item.fault.begin_s, item.fault.end_s),
                    "-" if item.back_s is None else duration_text(item.back_s),
                    item.fault.text,
                ]
                for item in robust.recoveries
            ],
            words=(1, 4, 7),
        )
        yield (
            '<p class="soft">Back after: from the fault until its member was first seen at a task again after the fault was undone; '
            "“-” where it had none again before the end. Of one that was idle this is mostly the wait for its next task.</p>"
        )


def _back_words(robust: Robustness) -> Cells:
    if robust.back_median_s is None or robust.back_max_s is None:
        return ["-"]
    words = f"median of the {robust.back_count} that met a member at work, {duration_text(robust.back_max_s)} the longest"
    return [duration_text(robust.back_median_s), words]


def _lasted(begin_s: float, end_s: float | None) -> str:
    if end_s is None:
        return "not undone"
    return duration_text(end_s - begin_s) if end_s > begin_s else "at once"


def _part(done: int, whole: int) -> str:
    return f"{done} of {whole} ({done / whole:.0%})" if whole else "0"


def _rounds(figures: RunFigures) -> Iterable[str]:
    if figures.rounds:
        rows = [
            [
                str(item.number),
                f"{item.begin_s:.1f} s",
                duration_text(item.end_s - item.begin_s),
                f"{item.folded} of {item.asked}",
                "yes" if item.on_time else "no",
                "-" if item.value is None else metric_text(figures.metric, item.value),
            ]
            for item in figures.rounds
        ]
        table = _table(["round", "began at", "took", "folded", "on time", _metric_name(figures)], rows)
        yield f"<details><summary>{count_text(len(rows), 'committed round')}</summary>{table}</details>"


# --- devices


def _devices(figures: RunFigures) -> Iterable[str]:
    yield "<h2>Devices</h2>"
    if not figures.devices:
        yield '<p class="soft">The testbed has none.</p>'
        return
    members = [*figures.devices, figures.coordinator]
    yield "<h3>What they did</h3>"
    yield _table(
        ["device", "kind", "rounds", "samples", "share", "failed", "lost", "late", "refused", "again", "faults", "named failure"],
        [
            [
                item.device,
                item.kind,
                f"{item.rounds_done}/{item.rounds_asked}",
                f"{item.samples:,}",
                f"{item.share:.1%}",
                *(
                    str(number) if number else "-"
                    for number in (item.failed, item.missed, item.late, item.refused, item.retrained, item.faults)
                ),
                item.failure,
            ]
            for item in figures.devices
        ],
        words=(1, 11),
    )
    heads = [(head, parts) for head, parts in _ACTIVITY_HEADS if any(item.seconds[part] > 0 for item in figures.devices for part in parts)]
    yield "<h3>Where their time went</h3>"
    yield _table(
        ["device", *(head for head, _ in heads)],
        [[item.device, *(_seconds(sum(item.seconds[part] for part in parts)) for _, parts in heads)] for item in figures.devices],
    )
    yield "<h3>What they used</h3>"
    yield _table(
        [
            "device",
            "sent",
            "received",
            "up, highest",
            "down, highest",
            "CPU time",
            "CPUs, highest",
            "peak memory",
            "memory kills",
            "energy",
        ],
        [_used(item) for item in members],
    )
    yield (
        '<p class="soft">Highest: the most between two samples, of what the testbed allows. Bytes are those on the device’s own interface. '
        "Memory counts the page cache, too, where the testbed’s limits do.</p>"
    )


def _seconds(seconds: float) -> str:
    return "-" if seconds < 0.05 else f"{seconds:,.1f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _used(item: DeviceFigures) -> Cells:
    allowed_bytes = "" if item.memory_mib is None else f" of {bytes_text(item.memory_mib * (1 << 20))}"
    return [
        item.device,
        "-" if item.sent_bytes is None else bytes_text(item.sent_bytes),
        "-" if item.received_bytes is None else bytes_text(item.received_bytes),
        _of(item.up_mbit_highest, item.up_mbit, " Mbit/s"),
        _of(item.down_mbit_highest, item.down_mbit, " Mbit/s"),
        cost_text("cpu_s", item.cpu_s),
        _of(item.cpus_highest, item.cpus, ""),
        "-" if item.memory_peak_bytes is None else bytes_text(item.memory_peak_bytes) + allowed_bytes,
        "-" if item.out_of_memory_kills is None else str(item.out_of_memory_kills),
        "none" if item.energy_j is None else f"{item.energy_j:,.0f} J",
    ]


def _of(found: float | None, allowed: float | None, unit: str) -> str:
    if found is None:
        return "-"
    return f"{found:.3g}" + (f" of {allowed:g}{unit}" if allowed is not None else unit)


# --- what was run


def _about(record: Record) -> Iterable[str]:
    yield "<h2>What was run</h2>"
    parts = [
        ("Machine that played the boards", _json(record.began.machine)),
        ("Testbed", _json(record.began.spec)),
        ("Schedule of faults", _json(record.began.chaos)),
        ("Job file", record.began.job),
    ]
    for name, words in parts:
        if words:
            yield f"<details><summary>{safe(name)}</summary><pre>{safe(words)}</pre></details>"
    yield (
        '<p class="soft">Devices are emulated on one machine, by quotas of processor and memory and by shaped links: relative speeds are '
        "those of the kinds, absolute ones are this machine’s.</p>"
    )


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) if value else ""


def _table(heads: Sequence[str], rows: Sequence[Cells], *, words: Sequence[int] = (), head: bool = True) -> str:
    """Figures to the right; the first column and those named in `words` to the left."""

    def cell(tag: str, index: int, text: str) -> str:
        return f'<{tag} class="words">{safe(text)}</{tag}>' if index in words else f"<{tag}>{safe(text)}</{tag}>"

    lines = ["<thead><tr>" + "".join(cell("th", index, text) for index, text in enumerate(heads)) + "</tr></thead>"] if head else []
    body = "".join("<tr>" + "".join(cell("td", index, text) for index, text in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table>{"".join(lines)}<tbody>{body}</tbody></table></div>'
