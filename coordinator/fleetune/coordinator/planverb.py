"""`fleetune plan`: a fleet file in, a plan out, as a table or as JSON; nothing is run."""

# Only click and the standard library at import time, as in cli.py: numpy, scipy and rich are loaded when a plan is asked for.

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from fleetune.coordinator import cliverbs
from fleetune.coordinator.exitcodes import ExitCode
from fleetune.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fleetune.coordinator.jobsections import JobSpec
    from fleetune.coordinator.jsonview import Json
    from fleetune.coordinator.planner.explain import Explanation
    from fleetune.coordinator.planner.plan import Plan, SolverName
    from fleetune.coordinator.planner.predict import Prediction
    from fleetune.coordinator.planner.problem import Fleet

EXAMPLES = (
    "fleetune plan --fleet fleet.json",
    "fleetune plan --fleet fleet.json --explain",
    "fleetune plan --fleet fleet.json --job job.toml",
    "fleetune plan --fleet - --solver dual --json < fleet.json | jq .certificate",
)
CODES = (ExitCode.INFEASIBLE, ExitCode.MACHINE)

SOLVERS = ("exact", "crunch-equal", "dual", "random-equal", "greedy-equal", "best-single")

_UNITS = {"bit/s": "bit/s", "hz": "Hz", "airtime": "of the airtime"}
_METHODS = {
    "deft": "DEFT, this plan",
    "data-parallel": "federated LoRA, all that hold it",
    "data-parallel-fastest": "federated LoRA, fastest subset",
    "best-single": "best single device",
    "depth": "depth-aware data parallelism",
}


@click.option(
    "--fleet",
    "fleet_file",
    required=True,
    metavar="FILE",
    type=click.Path(allow_dash=True, path_type=Path),
    help="The fleet, as JSON; - is standard input.",
)
@click.option(
    "--job",
    "job_file",
    metavar="JOB.toml",
    type=click.Path(path_type=Path),
    help="Also predict what other methods would take, for the rows of this job.",
)
@click.option(
    "--solver",
    type=click.Choice(SOLVERS),
    default="exact",
    show_default=True,
    help="exact is the fastest plan; others compare.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seeds random-equal.")
@click.option("--explain", is_flag=True, help="Say why each device got what it got.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of text.")
@click.pass_context
def plan(
    context: click.Context, fleet_file: Path, job_file: Path | None, solver: SolverName, seed: int, explain: bool, as_json: bool
) -> int:
    """Plan a round of a fleet without running anything.

    Says who trains which block with which share of the uplink, when each finishes, how long the round takes, and how far from the best
    that is, provably. The file's schema and the solvers are described in docs/planner.md. "-" reads the fleet from standard input.
    """
    from fleetune.coordinator import planfile

    fleet = planfile.parse(sys.stdin.buffer.read(planfile.FILE_BYTES_MAX + 1)) if str(fleet_file) == "-" else planfile.load(fleet_file)
    job = None if job_file is None else _job(job_file)

    from fleetune.coordinator.planner import explain as explaining
    from fleetune.coordinator.planner import plan as planning

    made = planning.plan(fleet, solver, seed=seed)
    reasons = explaining.explanations(fleet, made) if explain else None
    predicted = None if job is None else _predictions(fleet, made, job)
    if as_json:
        sys.stdout.write(json.dumps(plan_json(made, reasons, predicted), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        _show(cliverbs.console(context), fleet, made, reasons, predicted)
    return ExitCode.OK if made.feasible else ExitCode.INFEASIBLE


def plan_json(made: Plan, reasons: Sequence[Explanation] | None = None, predicted: Sequence[Prediction] | None = None) -> dict[str, Json]:
    """The stable output schema; `explanations` and `predictions` stand in it only where they were asked for."""
    document = cast("dict[str, Json]", asdict(made))
    if reasons is not None:
        document["explanations"] = cast("Json", [asdict(reason) for reason in reasons])
    if predicted is not None:
        document["predictions"] = cast("Json", [asdict(one) for one in predicted])
    return document


def _job(file: Path) -> JobSpec:
    from fleetune.coordinator import jobspec

    try:
        return jobspec.parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the job file {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the job file {file} is not UTF-8 text.") from error


def _predictions(fleet: Fleet, made: Plan, job: JobSpec) -> tuple[Prediction, ...]:
    """Rows of a device and round are those of the job's steps, of one step where it counts in epochs; the common number is the rows that
    data-parallel training would pass forward with one device in all rounds."""
    from fleetune.coordinator.planner import predict

    rows = float(max(job.training.steps, 1) * job.training.batch_size * job.training.gradient_accumulation)
    return predict.predictions(fleet, made, rows, rows * job.rounds.count)


def _show(
    console: Console, fleet: Fleet, made: Plan, reasons: Sequence[Explanation] | None, predicted: Sequence[Prediction] | None
) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(
        "block", "device", Column("share", justify="right"), Column("part", justify="right"), Column("ready", justify="right"),
        Column("finish", justify="right"), box=None, pad_edge=False, header_style="bold",
    )  # fmt: skip
    for row in made.assignments:
        part = f"{row.share / fleet.total:.1%}" if fleet.total > 0 else "-"
        cells = (f"{row.share:.4g}", part, f"{row.ready_seconds:.4g} s", f"{row.finish_seconds:.4g} s")
        table.add_row(Text(row.block), Text(row.device), *cells)
    if made.assignments:
        console.print(table)
        console.print()
    for line in _summary(fleet, made):
        console.print(Text(line))
    if reasons is not None:
        console.print()
        for reason in reasons:
            console.print(Text.assemble((reason.name, "bold"), " ", reason.text))
    if predicted is not None:
        console.print()
        _show_predictions(console, predicted)


def _summary(fleet: Fleet, made: Plan) -> list[str]:
    lines: list[str] = []
    if not made.feasible:
        count = len(made.uncovered_blocks)
        lines.append(f"not feasible: {count} of {len(fleet.blocks)} blocks cannot be covered ({_few(made.uncovered_blocks)})")
    if made.round_seconds is not None:
        used = sum(row.share for row in made.assignments)
        lines.append(f"round: {made.round_seconds:.6g} s by {made.solver}, with {used:.4g} of {fleet.total:.4g} {_UNITS[fleet.kind]}")
    certificate = made.certificate
    if certificate.lower_bound_seconds is not None and certificate.gap is not None:
        proof = f"certificate: no plan ({certificate.scope}) takes less than {certificate.lower_bound_seconds:.6g} s; "
        lines.append(proof + ("this one is optimal" if certificate.gap < 1e-9 else f"this one may be {certificate.gap:.3%} above the best"))
    if made.idle_devices:
        lines.append(f"idle: {len(made.idle_devices)} ({_few(made.idle_devices)})")
    return lines


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _show_predictions(console: Console, predicted: Sequence[Prediction]) -> None:
    from rich.table import Column, Table

    from fleetune.coordinator.planner import predict

    rows = predicted[0].rows if predicted else 0.0
    numbers = ("devices", "round", "s / row", "s / full-gradient row", f"to {rows:.6g} rows", "to as many with full gradient")
    table = Table("method", *(Column(name, justify="right") for name in numbers), box=None, pad_edge=False, header_style="bold")
    for one in predicted:
        times = (
            one.round_seconds,
            one.seconds_per_row,
            one.seconds_per_full_gradient_row,
            one.seconds_to_rows,
            one.seconds_to_full_gradient_rows,
        )
        cells = ["-" if value is None else f"{value:.4g}" for value in times]
        table.add_row(_METHODS[one.method], str(len(one.devices)), *cells)
    console.print(table)
    best = predict.choice(predicted)
    console.print("no method can run on this fleet" if best is None else f"soonest by full gradients: {_METHODS[best.method]}")
