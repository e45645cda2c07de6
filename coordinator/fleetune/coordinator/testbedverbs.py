"""Verbs of `fleetune testbed`: a coordinator and unequal devices on this machine, with faults, and a report."""

# Only click and the standard library at import time, as in cli.py.

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from fleetune.coordinator.cliverbs import Verb, VerbGroup, print_json, say
from fleetune.coordinator.cliverbs import console as open_console
from fleetune.coordinator.exitcodes import ExitCode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fleetune.coordinator.jsonview import Json
    from fleetune.coordinator.testbed.backend import Backend
    from fleetune.coordinator.testbed.schedule import Act
    from fleetune.coordinator.testbed.statefile import Kept

FOLDER = Path("testbed-state")

LEFT_ALONE = ("run.jsonl", "report.html", "report.json", "timeline.svg")
"""What a run was for; `down` keeps it."""

_folder = click.option(
    "--folder", type=click.Path(path_type=Path), default=FOLDER, show_default=True, metavar="DIR", help="Folder of the testbed."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of text.")
_CODES = (ExitCode.MACHINE, ExitCode.NOT_FOUND)


@click.group(
    cls=VerbGroup,
    short_help="Unequal devices on this machine, with faults and a report.",
    examples=[
        "fleetune testbed up",
        "fleetune testbed run --chaos deploy/chaos.toml",
        "fleetune testbed report",
        "fleetune testbed down",
    ],
    codes=_CODES,
)
def testbed() -> None:
    """Play a fleet of unequal devices on this machine: a coordinator and agents that are held to the processors, memory, links and disks
    of boards, while faults happen to them.

    What devices there are says a testbed.toml; docs/testbed.md describes it.
    """


@testbed.command(
    cls=Verb,
    short_help="Start a coordinator and devices.",
    examples=[
        "fleetune testbed up",
        "fleetune testbed up --file deploy/testbed.toml --backend netns",
        "fleetune testbed up --backend process --data ./my-texts",
    ],
    codes=_CODES,
)
@click.option("--file", type=click.Path(path_type=Path), metavar="TESTBED.toml", help="The devices; six unequal ones if left out.")
@click.option(
    "--backend",
    type=click.Choice(["compose", "netns", "process"]),
    default="compose",
    show_default=True,
    help="Containers; network namespaces (root); or plain processes without quotas and links.",
)
@_folder
@click.option("--data", type=click.Path(path_type=Path), help="Folder with train.jsonl, validation.jsonl and test.jsonl (text, label).")
@click.option("--base", type=click.Path(path_type=Path), help="Folder of another base model; MiniLM from the [demo] extra if left out.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="What one backend alone understands; may be given often.")
@_json
def up(file: Path | None, backend: str, folder: Path, data: Path | None, base: Path | None, options: tuple[str, ...], as_json: bool) -> int:
    """Start a coordinator and devices on this machine, and return when all of them are online.

    They go on without a terminal until `fleetune testbed down`. What fails half way is undone.
    """
    from fleetune.coordinator.faults import FolderInUseError
    from fleetune.coordinator.testbed import backends, material, statefile, testbedfile
    from fleetune.coordinator.testbed.backend import Place
    from fleetune.coordinator.testbed.runner import terminated_as_interrupt

    spec = testbedfile.parse(testbedfile.DEFAULT) if file is None else testbedfile.load(file)
    own_options = _options(options)
    folder = folder.absolute()
    if (folder / statefile.FILE).exists():
        raise FolderInUseError(f"a testbed is up in {folder}.", "`fleetune testbed down` ends it; --folder names another folder.")
    if folder.exists() and any(entry.name not in LEFT_ALONE for entry in folder.iterdir()):
        raise FolderInUseError(f"{folder} holds something that is no testbed's.", "Name another folder with --folder.")
    begun_s = time.monotonic()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with terminated_as_interrupt():
        source = material.find_base(base)
        copy = None if source is None else folder / "base" / material.base_name(base)
        place = Place(spec, folder, statefile.new_prefix(), copy, own_options)
        made = backends.make(backend, place)
        # First of all the note: whatever happens from here on, `down` knows what to look for.
        statefile.write(statefile.Kept(backend, place, time.time()))
        try:
            dealt = material.lay_out(folder, spec, data)
            if source is not None and copy is not None:
                material.copy_base(source, copy)
                material.write_job(folder, spec, copy)
            made.up()
        except BaseException:
            made.down()
            _clear(folder)
            raise
    seconds = time.monotonic() - begun_s
    if as_json:
        rows: list[Json] = [{"name": one.device, "rows": one.rows, "validation_rows": one.validation_rows} for one in dealt]
        print_json({"folder": str(folder), "backend": backend, "seconds": round(seconds, 3), "devices": rows})
    else:
        counts = ", ".join(f"{one.device} {one.rows}" for one in dealt)
        say(f"{spec.name}: up in {seconds:.1f} s by the {backend} backend; rows: {counts}")
        say(f"`fleetune testbed run{_where(folder)}` trains on it, `fleetune testbed down{_where(folder)}` ends it")
    return ExitCode.OK


@testbed.command(
    cls=Verb,
    short_help="Say who lives and what they are at.",
    examples=["fleetune testbed status", "fleetune testbed status --json | jq '.members[].life'"],
    codes=_CODES,
)
@_folder
@_json
@click.pass_context
def status(context: click.Context, folder: Path, as_json: bool) -> int:
    """Say who lives, what they are at, and what they have taken so far."""
    import asyncio
    import json
    from dataclasses import asdict

    from fleetune.coordinator.testbed import picture, runner
    from fleetune.errors import FleetuneError

    kept, backend = _open(folder)
    devices: list[dict[str, Any]] = []
    job: dict[str, Any] = {}
    trouble = ""
    try:
        devices = json.loads(asyncio.run(runner.ask(backend, "devices", "--json")))["devices"]
        jobs = json.loads(asyncio.run(runner.ask(backend, "jobs", "--limit", "1", "--json")))["jobs"]
        job = jobs[-1] if jobs else {}
    except FleetuneError as error:
        trouble = str(error)
    sampled = asyncio.run(runner.sample(backend, job))
    rows = picture.rows(kept.place.spec, sampled, devices)
    if as_json:
        members = cast("list[Json]", [asdict(row) for row in rows])
        facts: dict[str, Json] = {"folder": str(kept.place.folder), "backend": kept.backend, "name": kept.place.spec.name}
        print_json({**facts, "running": runner.running(kept.place.folder), "trouble": trouble, "members": members})
        return ExitCode.OK
    console = open_console(context)
    console.print(picture.table(rows))
    if trouble:
        say(f"\nthe coordinator does not answer: {trouble}")
    return ExitCode.OK


@testbed.command(
    cls=Verb,
    short_help="Train on it, with faults, and report.",
    examples=[
        "fleetune testbed run",
        "fleetune testbed run --chaos deploy/chaos.toml",
        "fleetune testbed run --job job.toml --set rounds.count=3 --chaos chaos.toml --no-report",
    ],
    codes=(*_CODES, ExitCode.JOB_FAILED, ExitCode.JOB_CANCELLED),
)
@_folder
@click.option(
    "--job", "job_file", type=click.Path(path_type=Path), metavar="JOB.toml", help="A MiniLM job on the testbed's rows if left out."
)
@click.option("--data", type=click.Path(path_type=Path), help="Deal the rows of this folder to the devices first.")
@click.option("--chaos", "chaos_file", type=click.Path(path_type=Path), metavar="CHAOS.toml", help="Faults to make meanwhile.")
@click.option("--set", "settings", multiple=True, metavar="PATH=VALUE", help="Replace a setting of the job; may be given often.")
@click.option("--plain", is_flag=True, help="One line per event instead of a live picture.")
@click.option("--no-report", is_flag=True, help="Leave the report to `fleetune testbed report`.")
@_json
@click.pass_context
def run(
    context: click.Context, folder: Path, job_file: Path | None, data: Path | None, chaos_file: Path | None,
    settings: tuple[str, ...], plain: bool, no_report: bool, as_json: bool,
) -> int:  # fmt: skip
    """Hand in a job, make faults meanwhile, read everybody's counters each second, follow the job to its end, and report.

    Ctrl-C undoes the faults that are open, and leaves testbed and job as they are.
    """
    from fleetune.coordinator import overrides
    from fleetune.coordinator.testbed import material, runner
    from fleetune.errors import ConfigError

    kept, backend = _open(folder)
    place = kept.place
    acts = _acts(chaos_file, kept, backend)
    if data is not None:
        _deal_again(kept, backend, data)
    if job_file is None and place.base is None:
        raise ConfigError("the testbed has no base model for its own job.", "Name a job with --job, or run `up` again with --base.")
    text = _text(job_file if job_file is not None else place.folder / material.JOB_FILE)
    text = overrides.apply(text, settings)
    console = open_console(context)
    try:
        if as_json:
            outcome = runner.interruptible(runner.run(kept, backend, text, acts, _told, lambda _: None))
        elif plain or not console.is_terminal:
            outcome = runner.interruptible(runner.run(kept, backend, text, acts, _stamped, lambda _: None))
        else:
            outcome = _run_live(console, kept, backend, text, acts)
    except KeyboardInterrupt:
        say(f"open faults are undone; testbed and job go on: `fleetune testbed status{_where(place.folder)}`")
        raise
    made = {} if no_report else _report(place.folder, place.folder)
    if as_json:
        print_json({"status": outcome.status, "record": str(outcome.file), "report": made})
    else:
        _say_report(made)
    return {"completed": ExitCode.OK, "cancelled": ExitCode.JOB_CANCELLED}.get(outcome.status, ExitCode.JOB_FAILED)


@testbed.command(
    cls=Verb,
    short_help="Make faults in whatever runs there.",
    examples=["fleetune testbed chaos deploy/chaos.toml", "fleetune testbed chaos deploy/chaos.toml --dry-run"],
    codes=_CODES,
)
@click.argument("chaos_file", metavar="CHAOS.toml", type=click.Path(path_type=Path))
@_folder
@click.option("--dry-run", is_flag=True, help="Only print what would be done, and when.")
@_json
def chaos(chaos_file: Path, folder: Path, dry_run: bool, as_json: bool) -> int:
    """Make the faults of a chaos.toml in whatever runs there; times count from now.

    Ctrl-C undoes the faults that are open.
    """
    from dataclasses import asdict

    from fleetune.coordinator.testbed import runner

    kept, backend = _open(folder)
    acts = _acts(chaos_file, kept, backend)
    if not dry_run:
        notes = runner.interruptible(runner.chaos(kept, backend, acts, (lambda _: None) if as_json else _stamped))
    else:
        notes = []
    if as_json:
        print_json({"acts": cast("list[Json]", [asdict(act) for act in acts]), "notes": notes})
    elif dry_run:
        for act in acts:
            say(f"{act.at_s:8.1f} s  {act.member}: {act.verb.replace('_', ' ')}")
    return ExitCode.MACHINE if notes else ExitCode.OK


@testbed.command(
    cls=Verb,
    short_help="Make the report of the last run.",
    examples=["fleetune testbed report", "fleetune testbed report --out ./report"],
    codes=_CODES,
)
@_folder
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Where the report goes; the testbed's folder if left out.")
@_json
def report(folder: Path, out: Path | None, as_json: bool) -> int:
    """Make the report of the last run: report.html, report.json and timeline.svg.

    Works from the record alone, also when the testbed is down.
    """
    folder = folder.absolute()
    made = _report(folder, folder if out is None else out.absolute())
    if as_json:
        print_json({"report": made})
    else:
        _say_report(made)
    return ExitCode.OK


@testbed.command(
    cls=Verb,
    short_help="End it, and remove everything of it.",
    examples=["fleetune testbed down", "fleetune testbed down --folder ./testbed-state"],
    codes=(*_CODES, ExitCode.UNSOUND),
)
@_folder
@click.option("--all", "everything", is_flag=True, help="Remove the record and the report, too.")
@_json
def down(folder: Path, everything: bool, as_json: bool) -> int:
    """End all members, check the history that the coordinator has left, and remove everything but the record and the report.

    Also after a crash of `up` or half a start. Says what was removed.
    """
    from fleetune.coordinator.testbed import record, runner, statefile
    from fleetune.errors import FleetuneError

    folder = folder.absolute()
    violations: list[dict[str, Any]] | None = None
    removed: list[str] = []
    if (folder / statefile.FILE).exists():
        _, backend = _open(folder)
        try:
            there = [member for member, life in backend.lives().items() if life in ("running", "paused")]
            removed += [f"{len(there)} members ({', '.join(there)})"] if there else []
            backend.stop()
            violations = backend.check()
        except FleetuneError as error:
            sys.stderr.write(f"the history was not checked: {error}\n")
        removed += backend.down()
        file = folder / runner.RUN_FILE
        if violations is not None and file.exists():
            with file.open("a", encoding="utf-8") as out:
                out.write(record.line(record.Checked(time.time(), violations)))
            if (folder / "report.json").exists():
                _report(folder, folder)
        removed.append(f"what it worked on in {folder}")
    _clear(folder, everything=everything)
    if as_json:
        print_json({"removed": cast("list[Json]", removed), "violations": cast("Json", violations)})
    else:
        say("\n".join(f"removed: {what}" for what in removed) or f"nothing to remove: no testbed in {folder}")
        if violations is not None:
            say(f"history: {'sound' if not violations else f'{len(violations)} violations'}")
            for violation in violations:
                say(f"  {violation}")
    return ExitCode.UNSOUND if violations else ExitCode.OK


def _open(folder: Path) -> tuple[Kept, Backend]:
    from fleetune.coordinator.testbed import backends, statefile

    kept = statefile.read(folder.absolute())
    return kept, backends.make(kept.backend, kept.place)


def _acts(file: Path | None, kept: Kept, backend: Backend) -> Sequence[Act]:
    from fleetune.coordinator.testbed import chaosfile, schedule

    if file is None:
        return ()
    return schedule.acts(chaosfile.load(file, kept.place.spec, backend.faults, backend.name), kept.place.spec)


def _deal_again(kept: Kept, backend: Backend, data: Path) -> None:
    """Other rows for the devices, which look at theirs when they start."""
    from fleetune.coordinator.testbed import material

    place = kept.place
    material.deal(place.folder, place.spec, data)
    if place.base is not None:
        material.write_job(place.folder, place.spec, place.base)
    for name in place.spec.names:
        backend.kill(name)
        backend.restart(name)


def _run_live(console: Any, kept: Kept, backend: Backend, text: str, acts: Sequence[Act]) -> Any:  # Any: rich and the runner come late
    from rich.live import Live

    from fleetune.coordinator.testbed import picture, runner

    news: list[str] = []
    with Live(console=console, refresh_per_second=4) as screen:

        def look(state: runner.Run) -> None:
            if state.sample is not None:
                screen.update(picture.live(kept.place.spec, state.sample, news, time.time() - state.began_unix_s))

        def hear(text: str) -> None:
            news.append(f"{time.strftime('%H:%M:%S')}  {text}")

        return runner.interruptible(runner.run(kept, backend, text, acts, hear, look))


def _report(folder: Path, out: Path) -> dict[str, Json]:
    """Its files by what they are."""
    from fleetune.coordinator.faults import NotFoundError
    from fleetune.coordinator.testbed import runner
    from fleetune.coordinator.testbed.report import write_report

    file = folder / runner.RUN_FILE
    if not file.exists():
        raise NotFoundError(f"no run was recorded in {folder}.", "`fleetune testbed run` makes one.")
    out.mkdir(parents=True, exist_ok=True)
    paths = write_report(file, out)
    return {"html": str(paths.html), "json": str(paths.json), "timeline": str(paths.timeline)}


def _say_report(made: dict[str, Json]) -> None:
    if made:
        say(f"report: {made['html']}, and report.json and timeline.svg beside it")


def _clear(folder: Path, *, everything: bool = False) -> None:
    """What a testbed has laid into its folder, and the folder where nothing is left in it. Nobody else's files."""
    from fleetune.coordinator.testbed import material, runner, statefile

    for name in ("data", "config", "base"):
        shutil.rmtree(folder / name, ignore_errors=True)
    # The note last: until then `down` can be asked again.
    for name in (material.JOB_FILE, runner.RUNNING_FILE, *(LEFT_ALONE if everything else ()), statefile.FILE):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _options(words: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{word!r} is not NAME=VALUE.", param_hint="--option")
        found[name] = value
    return found


def _text(file: Path) -> str:
    from fleetune.coordinator.testbed import tables

    return tables.read_text("the job file", file)


def _stamped(text: str) -> None:
    say(f"{time.strftime('%H:%M:%S')}  {text}")
    sys.stdout.flush()


def _told(text: str) -> None:
    # The one document on stdout is what came of it.
    sys.stderr.write(f"{time.strftime('%H:%M:%S')}  {text}\n")


def _where(folder: Path) -> str:
    return "" if folder == FOLDER.absolute() else f" --folder {folder}"


VERBS: Sequence[click.Command] = (testbed,)
