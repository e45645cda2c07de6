"""`fleetune`: the command line of whoever runs a coordinator or a job on one."""

# Only click and the standard library at import time: `fleetune --help` and shell completion must be there at once. rich, grpc
# and everything heavier are imported by the verb that needs them.

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from fleetune.complaints import ComplaintsError
from fleetune.coordinator import cli_fleet, faults, planverb, shrinkverb, testbedverbs
from fleetune.coordinator.cliverbs import ADDRESS_VARIABLE, ASKING, Globals, Verb, asks, now, print_json, reaches, run, say
from fleetune.coordinator.cliverbs import console as open_console
from fleetune.coordinator.exitcodes import ExitCode
from fleetune.errors import ConfigError, FleetuneError, UnsupportedError

if TYPE_CHECKING:
    from rich.console import Console

    from fleetune.coordinator.client import Client
    from fleetune.coordinator.jsonview import Json
    from fleetune.v1 import control_pb2

DEBUG_VARIABLE = "FLEETUNE_DEBUG"

PROGRESS_S = 2.0

JOBS_SHOWN = 50
"""By `fleetune jobs`; a coordinator keeps jobs for years."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--coordinator",
    metavar="HOST:PORT",
    envvar=ADDRESS_VARIABLE,
    show_envvar=True,
    help="Where the coordinator listens; may also stand after the verb. Your identity knows where if left out.",
)
@reaches
@click.option("--no-color", is_flag=True, help="No colours; NO_COLOR in the environment does the same.")
@click.pass_context
def cli(context: click.Context, coordinator: str | None, no_color: bool) -> None:
    """Fine-tune language models on the machines you already have.

    A coordinator (`fleetune serve`) plans rounds, agents (`fleetune-agent run`) train on their own data, and the result of
    every round is an adapter that PEFT loads. `fleetune demo` shows all of it on this machine.

    JOB is a job's id, an unambiguous beginning of one, or "last".
    """
    context.obj = Globals(coordinator, no_color)


def _age_s(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """A span of time such as 90m, 12h or 30d in seconds."""
    if value is None:
        return None
    number, unit_s = value[:-1], {"m": 60.0, "h": 3600.0, "d": 86400.0}.get(value[-1:])
    if unit_s is None or not (number.isascii() and number.isdecimal()) or len(number) > 6:
        raise click.BadParameter(f"{value!r} is no age; a whole number with m, h or d is needed, such as 12h or 30d.", context, parameter)
    return int(number) * unit_s


_FOLLOWING = (*ASKING, ExitCode.JOB_FAILED, ExitCode.JOB_CANCELLED)


# --- running a coordinator -------------------------------------------------------------------------------------------


class ServeVerb(Verb):
    """`serve`, with one option for each row of the coordinator's settings; the table is read only when `serve` is asked for."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """--config, the table's options, --help."""
        from fleetune.complaints import shown
        from fleetune.coordinator.config import SETTINGS
        from fleetune.settings import Kind

        options: list[click.Parameter] = []
        for row in SETTINGS:
            name = row.path.replace(".", "_")
            declared = [f"--{name.replace('_', '-')}", f"setting_{name}"]
            default = row.default_words.replace("`", "") or shown(row.default)
            if row.kind is Kind.SWITCH:
                options.append(click.Option(declared, is_flag=True, default=None, help=row.help))
            else:
                words = f"{row.help}  [{row.unit + '; ' if row.unit else ''}default: {default}]"
                metavar = "|".join(row.choices) if row.choices else row.kind.name if row.kind is not Kind.PLACE else "PATH"
                options.append(click.Option(declared, metavar=metavar, help=words))
        own = super().get_params(ctx)
        return [*own[:-1], *options, *own[-1:]]


@cli.command(
    cls=ServeVerb,
    examples=[
        "fleetune serve",
        "fleetune serve --config /etc/fleetune/coordinator.toml",
        "fleetune serve --listen 0.0.0.0:7433",
        "fleetune serve --plaintext",
    ],
    codes=(ExitCode.MACHINE,),
)
@click.option("--config", type=click.Path(path_type=Path), help="Settings file; coordinator.toml of the person or the machine if left out.")
def serve(config: Path | None, **options: Any) -> int:  # Any: the table's options, by name
    """Run the coordinator until SIGTERM or Ctrl-C.

    Every option is also a setting of coordinator.toml and an environment variable FLEETUNE_COORDINATOR_*; the command line wins.
    """
    from fleetune.coordinator import config as configuration

    paths = {f"setting_{row.path.replace('.', '_')}": row.path for row in configuration.SETTINGS}
    overrides = {paths[name]: value for name, value in options.items() if value is not None}
    file = config if config is not None else configuration.find_file(os.environ, Path.home())
    settings = configuration.load(file, os.environ, overrides)

    from fleetune.coordinator import daemon

    return int(daemon.main(settings))


@cli.command(
    cls=Verb,
    short_help="See it all on this machine: a coordinator, agents, a small model.",
    examples=[
        "fleetune demo",
        "fleetune demo --method deft",
        "fleetune demo --method fedspine",
        "fleetune demo --method fedara",
        "fleetune demo --agents 4 --split dirichlet --alpha 0.5",
        "fleetune demo --data ./my-texts --rounds 5",
    ],
    codes=(ExitCode.JOB_FAILED, ExitCode.JOB_CANCELLED, ExitCode.MACHINE, ExitCode.TERMINATED),
)
@click.option("--data", type=click.Path(path_type=Path), help="Folder with train.jsonl, validation.jsonl and test.jsonl (text, label).")
@click.option(
    "--method",
    type=click.Choice(["fedavg_lora", "deft", "auto", "fedspine", "fedara"]),
    default="fedavg_lora",
    show_default=True,
    help="deft plans which agent trains which layers, on links of unequal speed; auto lets the planner choose who trains what; fedspine "
    "halves the model's layers while it is tuned; fedara keeps an ever smaller part of the adapters.",
)
@click.option(
    "--rounds", type=click.IntRange(1, 1000), help="Rounds to train; 12 if left out; 100 short ones for deft, 14 for fedspine and fedara."
)
@click.option(
    "--steps",
    type=click.IntRange(1, 10_000),
    help="Optimiser steps of an agent in a round; 12 if left out, 15 for fedspine. deft: agents take steps only if this is given, else "
    "they send gradients.",
)
@click.option("--agents", type=click.IntRange(1, 32), help="Agents to start; 3 if left out, 4 for deft, one for each block.")
@click.option("--split", type=click.Choice(["iid", "dirichlet"]), default="iid", show_default=True, help="How rows are dealt to agents.")
@click.option(
    "--alpha", type=click.FloatRange(0, min_open=True), default=0.5, show_default=True, help="Dirichlet: smaller is more unequal."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seeds the split and the training.")
@click.option("--keep", type=click.Path(path_type=Path), help="Work folder; fleetune-demo/<time> under the current folder if left out.")
@click.option("--base", type=click.Path(path_type=Path), help="Folder of another base model; MiniLM from the [demo] extra if left out.")
@click.option("--plain", is_flag=True, help="One line per event instead of a live picture.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.pass_context
def demo(context: click.Context, /, as_json: bool, plain: bool, **settings: Any) -> int:  # Any: the options above, by name
    """Fine-tune a small model with a coordinator and agents on this machine.

    Starts them as separate processes on loopback, deals the rows of the demo's data set to the agents, trains, and shows what
    came of it. Needs no network. Ctrl-C ends everything in order.
    """
    from fleetune.coordinator.demo import demo as run

    console = open_console(context)
    if settings["agents"] is None:
        settings["agents"] = run.AGENTS[settings["method"]]
    if settings["rounds"] is None:
        settings["rounds"] = run.ROUNDS[settings["method"]]
    return int(run.main(run.DemoSettings(**settings), console, lines=plain or not console.is_terminal, as_json=as_json))


# --- jobs ------------------------------------------------------------------------------------------------------------


@cli.command(
    cls=Verb,
    examples=[
        "fleetune submit job.toml",
        "fleetune submit job.toml --wait",
        "fleetune submit job.toml --set rounds.count=3 --set lora.rank=4",
        "cat job.toml | fleetune submit -",
    ],
    codes=_FOLLOWING,
)
@click.argument("file", metavar="JOB.toml", type=click.Path(allow_dash=True, path_type=Path))
@click.option("--wait", is_flag=True, help="Follow the job until it has ended; the exit code says how.")
@click.option("--set", "settings", multiple=True, metavar="PATH=VALUE", help="Replace a setting of the file; may be given often.")
@click.option("--plain", is_flag=True, help="With --wait: one line per event instead of a live picture.")
@asks
@click.pass_context
def submit(
    context: click.Context, file: Path, wait: bool, settings: tuple[str, ...], plain: bool, coordinator: str | None, as_json: bool
) -> int:
    """Hand a job file to the coordinator."""
    from fleetune.coordinator import overrides

    text = overrides.apply(_read_job(file), settings)
    console = open_console(context)

    async def ask(client: Client) -> int:
        job_id = await client.submit(text)
        if not wait:
            if as_json:
                print_json({"job_id": job_id})
            else:
                say(f"submitted as {job_id}; follow it with `fleetune watch {job_id}`")
            return ExitCode.OK
        if not as_json:
            return await _follow(client, job_id, console, lines=plain or not console.is_terminal, as_json=False)
        job = await _last_view(client.watch(job_id))
        _print_job(job)
        return _job_exit(job)

    return run(context, coordinator, ask)


@cli.command(cls=Verb, examples=["fleetune validate job.toml", "fleetune validate job.toml --json"])
@click.argument("file", metavar="JOB.toml", type=click.Path(allow_dash=True, path_type=Path))
@click.option("--set", "settings", multiple=True, metavar="PATH=VALUE", help="Replace a setting of the file; may be given often.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of text.")
def validate(file: Path, settings: tuple[str, ...], as_json: bool) -> int:
    """Report everything that is wrong with a job file.

    Looks at the file alone and needs no coordinator: path, value, what is allowed and what to do for each mistake.
    """
    from fleetune.coordinator import jobspec, overrides

    text = _read_job(file)
    # A file that is no TOML is reported by the parser, like any other mistake.
    spec = jobspec.parse(overrides.apply(text, settings) if settings else text)
    if as_json:
        print_json({"valid": True, "complaints": [], "job": cast("Json", spec.model_dump(mode="json"))})
    else:
        say(f"{file}: valid ({spec.method.name}, {spec.rounds.count} rounds)")
    return ExitCode.OK


@cli.command(
    cls=Verb,
    short_help="Follow a job until it has ended.",
    examples=["fleetune watch", "fleetune watch 7f3a", "fleetune watch last --json | jq .state"],
    codes=(*_FOLLOWING, ExitCode.NOT_FOUND),
)
@click.argument("job", metavar="[JOB]", default="last")
@click.option("--plain", is_flag=True, help="One line per event instead of a live picture.")
@asks
@click.pass_context
def watch(context: click.Context, job: str, plain: bool, coordinator: str | None, as_json: bool) -> int:
    """Follow a job until it has ended; the last one if none is named.

    Ctrl-C ends the watch, not the job. With --json: one JSON document a line at each change.
    """
    console = open_console(context)

    async def ask(client: Client) -> int:
        return await _follow(client, job, console, lines=plain or not console.is_terminal, as_json=as_json)

    return run(context, coordinator, ask)


@cli.command(
    cls=Verb,
    examples=["fleetune jobs", "fleetune jobs --limit 5", "fleetune jobs --all --json | jq '.jobs[].state'"],
    codes=ASKING,
)
@click.option(
    "--limit", type=click.IntRange(1, 100_000), default=JOBS_SHOWN, show_default=True, metavar="N", help="Only so many of the newest."
)
@click.option("--all", "everything", is_flag=True, help="All of them.")
@asks
@click.pass_context
def jobs(context: click.Context, limit: int, everything: bool, coordinator: str | None, as_json: bool) -> int:
    """List the newest jobs, the newest last."""
    console = open_console(context)

    async def ask(client: Client) -> int:
        from fleetune.coordinator import listing
        from fleetune.coordinator.jsonview import message_json

        # One more than is shown tells whether there are more.
        found = await client.jobs(None if everything else limit + 1)
        more = not everything and len(found) > limit
        found = found[1:] if more else found
        if as_json:
            print_json({"jobs": [message_json(job) for job in found]})
        elif found:
            console.print(listing.jobs(found, now_unix_s=now()))
        else:
            say("no jobs yet; `fleetune submit job.toml` makes one")
        if more:
            sys.stderr.write(f"the newest {limit}; --all lists the older ones, too\n")
        return ExitCode.OK

    return run(context, coordinator, ask)


@cli.command(
    cls=Verb,
    short_help="Say what became of a job.",
    examples=["fleetune report", "fleetune report 7f3a --json"],
    codes=(*ASKING, ExitCode.NOT_FOUND),
)
@click.argument("job", metavar="[JOB]", default="last")
@asks
@click.pass_context
def report(context: click.Context, job: str, coordinator: str | None, as_json: bool) -> int:
    """Say what became of a job: rounds, devices' shares, best round, failures."""
    console = open_console(context)

    async def ask(client: Client) -> int:
        from fleetune.coordinator import report as reports

        found = await client.job(job)
        if as_json:
            print_json(reports.report_json(found))
        else:
            console.print(reports.report(found, now_unix_s=now(), width=console.width))
        return ExitCode.OK

    return run(context, coordinator, ask)


@cli.command(
    cls=Verb,
    examples=["fleetune logs last", "fleetune logs 7f3a kitchen-pi", "fleetune logs last --json"],
    codes=(*ASKING, ExitCode.NOT_FOUND),
)
@click.argument("job", metavar="JOB")
@click.argument("device", metavar="[DEVICE]", default="")
@asks
@click.pass_context
def logs(context: click.Context, job: str, device: str, coordinator: str | None, as_json: bool) -> int:
    """Print what the training processes of a job's devices wrote."""
    console = open_console(context)

    async def ask(client: Client) -> int:
        from fleetune.coordinator import listing
        from fleetune.coordinator.jsonview import message_json

        lines = await client.logs(job, device)
        if as_json:
            print_json({"lines": [message_json(line) for line in lines]})
        elif lines:
            console.print(listing.log_lines(lines), soft_wrap=True)
        else:
            say("no log lines yet" + (f" from {device}" if device else ""))
        return ExitCode.OK

    return run(context, coordinator, ask)


@cli.command(
    cls=Verb,
    examples=["fleetune cancel last", 'fleetune cancel 7f3a --reason "wrong data"'],
    codes=(*ASKING, ExitCode.NOT_FOUND),
)
@click.argument("job", metavar="JOB")
@click.option("--reason", default="", help="Why, for whoever reads the report.")
@asks
@click.pass_context
def cancel(context: click.Context, job: str, reason: str, coordinator: str | None, as_json: bool) -> int:
    """End a job; the adapters of its committed rounds stay."""
    return _change(context, coordinator, as_json, lambda client: client.cancel(job, reason))


@cli.command(cls=Verb, examples=["fleetune pause last"], codes=(*ASKING, ExitCode.NOT_FOUND))
@click.argument("job", metavar="JOB")
@asks
@click.pass_context
def pause(context: click.Context, job: str, coordinator: str | None, as_json: bool) -> int:
    """Begin no further round of a job until it is resumed."""
    return _change(context, coordinator, as_json, lambda client: client.pause(job))


@cli.command(cls=Verb, examples=["fleetune resume last"], codes=(*ASKING, ExitCode.NOT_FOUND))
@click.argument("job", metavar="JOB")
@asks
@click.pass_context
def resume(context: click.Context, job: str, coordinator: str | None, as_json: bool) -> int:
    """Let a paused job go on."""
    return _change(context, coordinator, as_json, lambda client: client.resume(job))


@cli.command(
    cls=Verb,
    examples=["fleetune export last ./adapter", "fleetune export 7f3a ./best --best", "fleetune export 7f3a ./round-3 --round 3"],
    codes=(*ASKING, ExitCode.NOT_FOUND, ExitCode.MACHINE),
)
@click.argument("job", metavar="JOB")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--round", "round_number", type=click.IntRange(1), help="The adapter of this round instead of the last.")
@click.option("--best", is_flag=True, help="The adapter of the round with the best metric.")
@click.option("--force", is_flag=True, help="Write into a folder that is not empty; files of the same names are replaced.")
@asks
@click.pass_context
def export(
    context: click.Context,
    job: str,
    folder: Path,
    round_number: int | None,
    best: bool,
    force: bool,
    coordinator: str | None,
    as_json: bool,
) -> int:
    """Copy a job's adapter into a folder that PEFT loads.

    The folder is whole and verified, or it is not there.
    """
    if best and round_number is not None:
        raise click.UsageError("--best and --round exclude each other.")

    async def ask(client: Client) -> int:
        from fleetune.coordinator.figures import bytes_text

        done = await client.export(job, folder, round_number=round_number or 0, best=best, force=force)
        if as_json:
            print_json(
                {"job_id": done.job_id, "round": done.round, "folder": str(done.folder), "files": done.files, "size_bytes": done.size_bytes}
            )
        else:
            say(f"{done.folder}: adapter of round {done.round}, {done.files} files, {bytes_text(done.size_bytes)}")
        return ExitCode.OK

    return run(context, coordinator, ask)


@cli.command(
    cls=Verb,
    examples=["fleetune gc --dry-run", "fleetune gc", "fleetune gc --keep-rounds 1 --jobs-older-than 30d"],
    codes=ASKING,
)
@click.option(
    "--keep-rounds", type=click.IntRange(1), help="Ended jobs keep so many of their last rounds, and the best; all the rest goes."
)
@click.option(
    "--jobs-older-than", callback=_age_s, metavar="AGE", help="Trim only jobs that ended longer ago, such as 12h or 30d; alone: to 1 round."
)
@click.option("--dry-run", is_flag=True, help="Count, remove nothing.")
@asks
@click.pass_context
def gc(
    context: click.Context, keep_rounds: int | None, jobs_older_than: float | None, dry_run: bool, coordinator: str | None, as_json: bool
) -> int:
    """Clear away what no running job and no kept adapter needs.

    Without options that is what crashes and broken uploads have left. What a running job needs, and the last and the best
    adapter of every job, always stay.
    """
    keep = keep_rounds or (1 if jobs_older_than is not None else 0)

    async def ask(client: Client) -> int:
        from fleetune.coordinator import listing
        from fleetune.coordinator.jsonview import message_json

        found = await client.collect_garbage(keep_rounds=keep, jobs_older_than_s=jobs_older_than or 0.0, dry_run=dry_run)
        if as_json:
            document: dict[str, Json] = {"dry_run": dry_run}
            document.update(message_json(found))
            print_json(document)
        else:
            say(listing.garbage(found, dry_run=dry_run))
        return ExitCode.OK

    return run(context, coordinator, ask)


# --- the fleet -------------------------------------------------------------------------------------------------------


for _verb in cli_fleet.VERBS:
    cli.add_command(_verb)


@cli.command(
    cls=Verb,
    short_help="Ask whether the coordinator serves.",
    examples=["fleetune health", "fleetune health --coordinator 192.0.2.7:7433 --json"],
    codes=ASKING,
)
@asks
@click.pass_context
def health(context: click.Context, coordinator: str | None, as_json: bool) -> int:
    """Ask whether the coordinator serves; exit code 0 only if it does."""

    async def ask(client: Client) -> int:
        serving = await client.serving()
        info = await client.server_info() if serving else None
        if as_json:
            facts: dict[str, Json] = {"serving": serving, "address": client.address}
            if info is not None:
                facts.update(version=info.version, devices_online=info.devices_online, jobs_running=info.jobs_running)
            print_json(facts)
        elif info is not None:
            say(f"{client.address} serves: fleetune {info.version}, devices online {info.devices_online}, jobs running {info.jobs_running}")
        else:
            say(f"{client.address} answers, but does not serve: it starts or stops")
        return ExitCode.OK if serving else ExitCode.REFUSED

    return run(context, coordinator, ask)


@cli.command(
    cls=Verb, examples=["fleetune audit", "fleetune audit --limit 20", "fleetune audit --json | jq '.entries[].action'"], codes=ASKING
)
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="So many of the newest.")
@asks
@click.pass_context
def audit(context: click.Context, limit: int, coordinator: str | None, as_json: bool) -> int:
    """Say who asked the coordinator for what, and what became of it.

    Submits, cancels, pauses, resumes and restores, the newest last.
    """
    console = open_console(context)

    async def ask(client: Client) -> int:
        from fleetune.coordinator import listing
        from fleetune.coordinator.jsonview import message_json

        found = await client.audit(limit)
        if as_json:
            print_json({"entries": [message_json(entry) for entry in found]})
        elif found:
            console.print(listing.audit(found))
        else:
            say("nobody has asked for anything yet")
        return ExitCode.OK

    return run(context, coordinator, ask)


# --- backups ---------------------------------------------------------------------------------------------------------


@cli.command(
    cls=Verb,
    short_help="Write a coordinator's whole state into one file.",
    examples=[
        "fleetune backup fleetune-state /mnt/usb/fleetune-monday.tar",
        "fleetune backup /var/lib/fleetune fleetune.tar --json",
    ],
    codes=(ExitCode.MACHINE,),
)
@click.argument("state_dir", metavar="STATE_DIR", type=click.Path(path_type=Path))
@click.argument("target", metavar="TARGET.tar", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of text.")
def backup(state_dir: Path, target: Path, as_json: bool) -> int:
    """Write a coordinator's jobs, rounds, devices and blobs into one file.

    Works beside a running coordinator, which is not disturbed, and on a stopped one. The file is whole and on disk, or it is
    not there; every digest is checked on the way. Spooled uploads are not in it: devices send those again.
    """
    from fleetune.coordinator import backup as backups
    from fleetune.coordinator.figures import bytes_text

    made = backups.make(state_dir, target, _progress("copied", as_json))
    if as_json:
        facts: dict[str, Json] = {"target": str(made.target), "made_unix_s": made.manifest.made_unix_s, "epoch": made.manifest.epoch}
        print_json({**facts, "files": len(made.manifest.files), "size_bytes": made.size_bytes})
    else:
        say(f"{made.target}: {len(made.manifest.files)} files, {bytes_text(made.size_bytes)}")
    return ExitCode.OK


@cli.command(
    cls=Verb,
    examples=["fleetune restore /mnt/usb/fleetune-monday.tar fleetune-state", "fleetune restore fleetune.tar /var/lib/fleetune --json"],
    codes=(ExitCode.MACHINE,),
)
@click.argument("archive", metavar="ARCHIVE.tar", type=click.Path(path_type=Path))
@click.argument("state_dir", metavar="STATE_DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of text.")
def restore(archive: Path, state_dir: Path, as_json: bool) -> int:
    """Make a coordinator's state_dir out of a backup.

    STATE_DIR has to be empty or not there. It is whole, with every digest checked, or it is left as it was. What devices did after
    the backup is refused: the restored coordinator works in an epoch of its own, and open rounds are run again.
    """
    from fleetune.coordinator import restore as restoring

    done = restoring.restore(archive, state_dir, _progress("restored", as_json))
    if as_json:
        facts: dict[str, Json] = {"state_dir": str(done.state_dir), "made_unix_s": done.manifest.made_unix_s, "epoch": done.epoch}
        print_json({**facts, "files": len(done.manifest.files)})
    else:
        say(f"{done.state_dir}: {len(done.manifest.files)} files, epoch {done.epoch}; `fleetune serve --state-dir {state_dir}` runs it")
    return ExitCode.OK


def _progress(done_word: str, silent: bool) -> Callable[[int, int], None]:
    """A line on standard error every two seconds, the first after two."""
    import time

    from fleetune.coordinator.figures import bytes_text

    last_s = time.monotonic()

    def hear(done: int, total: int) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if not silent and now_s - last_s >= PROGRESS_S:
            last_s = now_s
            sys.stderr.write(f"{done_word} {bytes_text(done)} of {bytes_text(total)}\n")

    return hear


for _verb in testbedverbs.VERBS:
    cli.add_command(_verb)

cli.command(cls=Verb, examples=planverb.EXAMPLES, codes=planverb.CODES)(planverb.plan)
cli.command(cls=Verb, examples=shrinkverb.EXAMPLES, codes=shrinkverb.CODES)(shrinkverb.shrink)


# --- the tool itself -------------------------------------------------------------------------------------------------


@cli.command(
    cls=Verb,
    examples=[
        "fleetune completion bash > ~/.local/share/bash-completion/completions/fleetune",
        "fleetune completion zsh > ~/.zfunc/_fleetune",
        "fleetune completion fish > ~/.config/fish/completions/fleetune.fish",
    ],
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the completion script of a shell."""
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    if script is None:
        raise UnsupportedError(f"no completion for {shell}.", "Choose bash, zsh or fish.")
    say(script(cli, {}, "fleetune", "_FLEETUNE_COMPLETE").source())
    return ExitCode.OK


@cli.command(
    cls=Verb,
    short_help="Judge the history that a stopped coordinator has left.",
    examples=["fleetune check ~/.local/state/fleetune", "fleetune check STATE_DIR --json | jq '.violations[].rule'"],
    codes=(ExitCode.UNSOUND,),
)
@click.argument("state_dir", metavar="STATE_DIR", type=click.Path(path_type=Path))
@click.option(
    "--receipts", metavar="FILE", type=click.Path(path_type=Path), help="JSON lines of task_id, digest and status, as devices got them."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of text.")
def check(state_dir: Path, receipts: Path | None, as_json: bool) -> int:
    """Judge the history that a stopped coordinator has left in its state_dir.

    Reads the database and every blob, and changes nothing: accepted updates are in their rounds, once and with their weights; rounds
    follow each other without a gap; the stored events lead to the stored state; files have the digests they are named by.
    """
    from dataclasses import asdict

    from fleetune.coordinator.history import reader

    found = reader.examine(state_dir, receipts)
    if as_json:
        print_json({"sound": not found, "violations": [asdict(violation) for violation in found]})
    else:
        say("\n".join(str(violation) for violation in found) or f"{state_dir} is sound")
    return ExitCode.UNSOUND if found else ExitCode.OK


@cli.command(cls=Verb, examples=["fleetune version", "fleetune version --json"])
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of text.")
def version(as_json: bool) -> int:
    """Print the versions of Fleetune and of Python."""
    import platform
    from importlib import metadata

    own = metadata.version("fleetune")
    if as_json:
        print_json({"version": own, "python": platform.python_version()})
    else:
        say(f"fleetune {own}, Python {platform.python_version()}")
    return ExitCode.OK


# --- what the verbs share --------------------------------------------------------------------------------------------


def _read_job(file: Path) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the job file {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the job file {file} is not UTF-8 text.") from error


def _change(context: click.Context, coordinator: str | None, as_json: bool, ask: Callable[[Client], Awaitable[control_pb2.JobView]]) -> int:
    async def changed(client: Client) -> int:
        job = await ask(client)
        if as_json:
            _print_job(job)
        else:
            from fleetune.coordinator.watch import state_word

            say(f"{job.name} ({job.job_id}) is {state_word(job.state)}" + (f": {job.message}" if job.message else ""))
        return ExitCode.OK

    return run(context, coordinator, changed)


async def _follow(client: Client, job: str, console: Console, *, lines: bool, as_json: bool) -> int:
    import asyncio

    from fleetune.coordinator import watch as watching

    notice = watching.Notice()
    views = client.watch(job, notice.set)
    try:
        last = await (watching.show_json(views, sys.stdout) if as_json else watching.show(views, console, notice, lines=lines))
    except asyncio.CancelledError:
        # Ctrl-C: people wonder whether they have ended the job as well.
        sys.stderr.write(f"the job goes on; `fleetune watch {job}` follows it again, `fleetune cancel {job}` ends it\n")
        raise
    return _job_exit(last)


async def _last_view(views: AsyncIterator[control_pb2.JobView]) -> control_pb2.JobView:
    from fleetune.v1 import control_pb2

    last = control_pb2.JobView()
    async for view in views:
        last = view
    return last


def _job_exit(job: control_pb2.JobView) -> int:
    from fleetune.v1 import control_pb2

    return {
        control_pb2.JOB_STATE_COMPLETED: ExitCode.OK,
        control_pb2.JOB_STATE_CANCELLED: ExitCode.JOB_CANCELLED,
    }.get(job.state, ExitCode.JOB_FAILED)


def _print_job(job: control_pb2.JobView) -> None:
    from fleetune.coordinator.jsonview import message_json

    print_json(message_json(job))


# --- the edge of the process -----------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code; never a stack trace for a person, unless FLEETUNE_DEBUG asks for it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # grpc's own lines on stderr say nothing that our errors do not say better.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # Its fork hooks run between fork and exec of a child process, and now and then crash it there (uvloop forks by itself).
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    as_json = "--json" in words
    try:
        code = cli.main(args=words, prog_name="fleetune", standalone_mode=False)
        sys.stdout.flush()
        return int(code) if isinstance(code, int) else ExitCode.OK
    except (KeyboardInterrupt, click.Abort):
        sys.stderr.write("interrupted\n")
        return ExitCode.INTERRUPTED
    except click.ClickException as error:
        if as_json:
            _print_error("usage", error.format_message(), "", ExitCode.USAGE)
        else:
            error.show(sys.stderr)
        return ExitCode.USAGE
    except ComplaintsError as error:
        _show_complaints(error, as_json)
        return ExitCode.USAGE
    except FleetuneError as error:
        code = faults.exit_code(error)
        if as_json:
            _print_error(code.name.lower(), error.message, error.remedy, code)
        else:
            sys.stderr.write(f"fleetune: {error.message}\n" + (f"  {error.remedy}\n" if error.remedy else ""))
        _debug()
        return code
    except BrokenPipeError:
        # Whoever reads has seen enough (`fleetune jobs | head`); the interpreter must not fail at its own last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except Exception as error:  # noqa: BLE001 - the edge of the process: whatever arrives here is a bug, and is reported as one
        text = f"{type(error).__name__}: {error}"
        if as_json:
            _print_error("internal", text, "", ExitCode.INTERNAL)
        else:
            sys.stderr.write(f"fleetune: internal error, {text}\n  This is a bug; {DEBUG_VARIABLE}=1 shows where.\n")
        _debug()
        return ExitCode.INTERNAL


def _show_complaints(error: ComplaintsError, as_json: bool) -> None:
    if as_json:
        complaints: list[Json] = [
            {"path": item.path, "value": item.value, "allowed": item.allowed, "remedy": item.remedy} for item in error.complaints
        ]
        print_json({"valid": False, "complaints": complaints})
        return
    count = len(error.complaints)
    sys.stderr.write(f"fleetune: {error.subject} has {count} mistake{'' if count == 1 else 's'}\n")
    for item in error.complaints:
        found = f" = {item.value}" if item.value else ""
        sys.stderr.write(f"\n  {item.path or 'the file'}{found}\n")
        sys.stderr.write(f"    allowed: {item.allowed}\n" if item.allowed else "")
        sys.stderr.write(f"    {item.remedy}\n")


def _print_error(kind: str, message: str, remedy: str, code: ExitCode) -> None:
    print_json({"error": {"kind": kind, "message": message, "remedy": remedy, "exit_code": int(code)}})


def _debug() -> None:
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()


if __name__ == "__main__":
    sys.exit(main())
