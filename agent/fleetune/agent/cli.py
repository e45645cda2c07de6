"""`fleetune-agent`: the command line of whoever runs a device."""

# Only click and the standard library at import time: help and shell completion must be there at once, also on a small board.

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from fleetune.agent import cli_probe
from fleetune.errors import FleetuneError, UnreachableError, UnsupportedError

if TYPE_CHECKING:
    from fleetune.agent.config import AgentConfig


class ExitCode(IntEnum):
    """Exit statuses of `fleetune-agent`."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    UNREACHABLE = 3
    REFUSED = 4
    STATE_IN_USE = 5
    PROBLEMS = 6


MEANINGS: Mapping[ExitCode, str] = {
    ExitCode.OK: "done, or stopped by SIGINT or SIGTERM",
    ExitCode.INTERNAL: "internal error: a bug in Fleetune",
    ExitCode.USAGE: "usage error, wrong configuration or unusable machine",
    ExitCode.UNREACHABLE: "coordinator not reached within --connect-timeout-s",
    ExitCode.REFUSED: "refused by the coordinator: token, other protocol, name taken, device id in use; or another's root certificate",
    ExitCode.STATE_IN_USE: "another agent runs on this state folder",
    ExitCode.PROBLEMS: "`doctor` found problems",
}


class Verb(click.Command):
    """A command whose help ends with examples and its exit codes."""

    def __init__(
        self, *args: Any, examples: Sequence[str] = (), codes: Sequence[ExitCode] = (), **settings: Any
    ) -> None:  # Any: click's own
        super().__init__(*args, **settings)
        self.examples = tuple(examples)
        self.codes = (ExitCode.OK, ExitCode.INTERNAL, ExitCode.USAGE, *codes)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples as they are typed, then the codes."""
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code.value), MEANINGS[code]) for code in self.codes])


def configured(function: Callable[..., object]) -> Callable[..., object]:
    """Options of the verbs that read the configuration."""
    options = (
        click.option(
            "--config",
            "config_file",
            type=click.Path(dir_okay=False, path_type=Path),
            help="agent.toml to read; else $FLEETUNE_AGENT_CONFIG, ~/.config/fleetune/agent.toml or /etc/fleetune/agent.toml.",
        ),
        click.option("--coordinator", metavar="HOST:PORT", help="Coordinator to dial.  [default: the one of the join line]"),
        click.option("--name", metavar="NAME", help="What people call this device; unique in the fleet.  [default: the host name]"),
        click.option(
            "--state-dir", type=click.Path(file_okay=False, path_type=Path), help="Folder for the device's id, its outbox and its cache."
        ),
        click.option(
            "--data",
            "data",
            multiple=True,
            metavar="NAME=TRAIN[,VALIDATION]",
            help="Files with the rows of a data name; may be given several times.",
        ),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="SETTING=VALUE",
            help="Any other setting of agent.toml, for example training.cores=2; may be given several times.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """The agent of a device: measures it, trains what the coordinator asks for, and sends back updates, never data."""


@cli.command(
    cls=Verb,
    examples=[
        "fleetune-agent run --data intents=/data/train.jsonl,/data/validation.jsonl",
        "fleetune-agent run --config /etc/fleetune/agent.toml --log-format json",
        "fleetune-agent run --plaintext --coordinator 127.0.0.1:7433 --state-dir /tmp/bench-1 --connect-timeout-s 10",
    ],
    codes=[ExitCode.UNREACHABLE, ExitCode.REFUSED, ExitCode.STATE_IN_USE],
)
@configured
@click.option("--plaintext", is_flag=True, help="Without certificate and encryption, to a coordinator on this machine that runs so too.")
@click.option(
    "--connect-timeout-s",
    type=click.FloatRange(min=0, min_open=True),
    help="Give up if the coordinator was never reached for so long.  [default: try for ever]",
)
@click.option("--log-format", type=click.Choice(["auto", "text", "json"]), help="How to log.  [default: auto]")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="How much to log.  [default: info]")
@click.option("--json", "as_json", is_flag=True, help="The same as --log-format json.")
def run(
    plaintext: bool, connect_timeout_s: float | None, log_format: str | None, log_level: str | None, as_json: bool, **options: Any
) -> int:
    """Run the agent until it is stopped. It dials out: this machine needs no open port.

    Once, before that, the device joins the fleet with `fleetune-agent join`.
    """
    chosen = "json" if as_json else log_format
    config = _config(options, {"log.format": chosen, "log.level": log_level, "plaintext": "true" if plaintext else None})

    # Before grpc is imported. Its own log lines repeat what ours say; its fork hooks are for programs that fork without exec.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from fleetune import logs
    from fleetune.agent import service

    logs.configure(config.log_level, config.log_format)
    service.run(config, _version(), connect_timeout_s)
    return ExitCode.OK


@cli.command(
    cls=Verb,
    examples=[
        "fleetune-agent join",
        "ssh coordinator fleetune token create --json | jq -r .line | fleetune-agent join --name kitchen-pi -",
        "fleetune-agent join --again --config /etc/fleetune/agent.toml",
        "fleetune-agent join --certificate pi.pem --key pi.key --roots ca.pem --coordinator fleet.example:7433",
    ],
    codes=[ExitCode.UNREACHABLE, ExitCode.REFUSED],
)
@click.argument("line", metavar="[LINE|-]", default="")
@click.option("--name", metavar="NAME", help="What people call this device; unique in the fleet.  [default: the host name]")
@click.option("--state-dir", type=click.Path(file_okay=False, path_type=Path), help="Folder for the device's id and its identity.")
@click.option("--config", "config_file", type=click.Path(dir_okay=False, path_type=Path), help="agent.toml to read, as `run` does.")
@click.option("--again", is_flag=True, help="Replace the identity that this device has.")
@click.option("--certificate", metavar="FILE", type=click.Path(path_type=Path), help="PEM of an authority of your own, instead of a line.")
@click.option("--key", metavar="FILE", type=click.Path(path_type=Path), help="With --certificate: its key.")
@click.option("--roots", metavar="FILE", type=click.Path(path_type=Path), help="With --certificate: the roots of the coordinator's.")
@click.option("--coordinator", metavar="HOST:PORT", help="With --certificate: the coordinator to dial.")
@click.option("--server-name", metavar="NAME", default="", help="With --certificate: the name in the coordinator's, if not its host.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of text.")
def join(
    line: str,
    again: bool,
    certificate: Path | None,
    key: Path | None,
    roots: Path | None,
    server_name: str,
    as_json: bool,
    **named: Any,  # Any: name, state_dir, config_file and coordinator, as `run` takes them
) -> int:
    """Make this device a member of a fleet, with the line that `fleetune token create` printed.

    Without a line it is asked for, unseen, or read from standard input: what stands on a command line, other people of this machine can
    read. The key is made here and never leaves; the coordinator is known by the fingerprint in the line before it is told anything.
    """
    from fleetune.agent import joining

    config = _config({"settings": (), "data": (), **named}, {})
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    joining.refuse_overwriting(config, again=again)
    if certificate is not None or key is not None or roots is not None:
        if certificate is None or key is None or roots is None or line:
            raise click.UsageError("--certificate, --key and --roots belong together, and replace the line.")
        facts = joining.bring(config, joining.Files(certificate, key, roots, server_name))
    else:
        facts = joining.join(config, _join_line(line, joining.LINE_CHARACTERS_MAX))
    until = joining.date(facts.not_after_unix_s)
    if as_json:
        report = {
            "name": facts.name,
            "coordinator": facts.coordinator,
            "identity": str(joining.folder(config)),
            "not_before_unix_s": facts.not_before_unix_s,
            "not_after_unix_s": facts.not_after_unix_s,
        }
        _say(json.dumps(report, indent=2))
    else:
        _say(f"{facts.name} has joined the fleet of {facts.coordinator}")
        _say(f"certificate until {until}, renewed by `fleetune-agent run`; in {joining.folder(config)}")
    return ExitCode.OK


@cli.command(
    cls=Verb,
    examples=["fleetune-agent check", "fleetune-agent check --config agent.toml --json"],
)
@configured
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of text.")
def check(as_json: bool, **options: Any) -> int:
    """Check the configuration and its files, and print what the agent would report. Changes nothing."""
    from fleetune.agent.config import missing_files
    from fleetune.agent.methods import table
    from fleetune.agent.probe.profile import profile

    config = _config(options, {})
    missing = missing_files(config)
    found = profile(config.state_dir, config.training.cores, config.training.accelerator)
    report: dict[str, object] = {
        "config_file": str(config.file) if config.file is not None else None,
        "coordinator": config.coordinator or None,
        "name": config.name,
        "identity": _identity(config),
        "state_dir": str(config.state_dir),
        "tags": list(config.tags),
        "data": sorted(config.data),
        "models": sorted(config.models),
        "methods": sorted(table.METHODS),
        "machine": f"{found.board or found.machine}, {found.system}, Python {found.python_version}",
        "cores": found.cores,
        "memory_total_bytes": found.memory_total_bytes,
        "memory_available_bytes": found.memory_available_bytes,
        "disk_free_bytes": found.disk_free_bytes,
        "accelerator": f"{found.accelerator} {found.accelerator_name}".strip(),
    }
    if as_json:
        complaints = [vars(complaint) for complaint in missing]
        _say(json.dumps({**report, "complaints": complaints, "unused_environment": list(config.unused_environment)}, indent=2))
    else:
        width = max(len(name) for name in report)
        for name, value in report.items():
            text = ", ".join(cast("list[str]", value)) if isinstance(value, list) else str(value or "")
            _say(f"{name:<{width}}  {text or '-'}")
        for variable in config.unused_environment:
            _say(f"warning: the environment variable {variable} is no setting", error=True)
        for complaint in missing:
            _say(f"error: {complaint.sentence()}", error=True)
    return ExitCode.USAGE if missing else ExitCode.OK


@cli.command(cls=Verb, examples=["fleetune-agent version", "fleetune-agent version --json"])
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts instead of text.")
def version(as_json: bool) -> int:
    """Print the versions of Fleetune and of Python."""
    import platform

    if as_json:
        _say(json.dumps({"version": _version(), "python": platform.python_version()}))
    else:
        _say(f"fleetune-agent {_version()}, Python {platform.python_version()}")
    return ExitCode.OK


@cli.command(
    cls=Verb,
    examples=[
        "fleetune-agent completion bash > ~/.local/share/bash-completion/completions/fleetune-agent",
        "fleetune-agent completion zsh > ~/.zfunc/_fleetune-agent",
        "fleetune-agent completion fish > ~/.config/fish/completions/fleetune-agent.fish",
    ],
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the completion script of a shell."""
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    if script is None:
        raise UnsupportedError(f"no completion for {shell}.", "Choose bash, zsh or fish.")
    _say(script(cli, {}, "fleetune-agent", "_FLEETUNE_AGENT_COMPLETE").source())
    return ExitCode.OK


cli.command(cls=Verb, examples=cli_probe.PROBE_EXAMPLES)(cli_probe.probe)
cli.command(cls=Verb, examples=cli_probe.DOCTOR_EXAMPLES, codes=[ExitCode.PROBLEMS])(cli_probe.doctor)


def main() -> None:
    """The console script."""
    from fleetune.platform_check import require_64bit

    try:
        require_64bit()
        status = cli(prog_name="fleetune-agent", standalone_mode=False)
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(ExitCode.USAGE)
    except (click.Abort, KeyboardInterrupt):
        # Before the daemon took over the signals there was nothing to end in order.
        sys.exit(ExitCode.OK)
    except FleetuneError as error:
        _say(f"error: {error}", error=True)
        sys.exit(exit_code(error))
    sys.exit(int(status or ExitCode.OK))


def exit_code(error: FleetuneError) -> ExitCode:
    """The exit status of an error that a person can act on."""
    # By name: importing the session would import grpc.
    name = type(error).__name__
    if name == "StateInUseError":
        return ExitCode.STATE_IN_USE
    if name in ("RefusedError", "JoinRefusedError", "WrongCoordinatorError"):
        return ExitCode.REFUSED
    return ExitCode.UNREACHABLE if isinstance(error, UnreachableError) else ExitCode.USAGE


def _config(options: Mapping[str, Any], more: Mapping[str, object]) -> AgentConfig:
    from fleetune.agent import config

    overrides: dict[str, object] = {}
    for setting in options["settings"]:
        key, equals, value = str(setting).partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{setting!r} is not SETTING=VALUE, for example training.cores=2.", param_hint="--set")
        overrides[key] = value
    for option in options["data"]:
        name, equals, files = str(option).partition("=")
        parts = files.split(",")
        if not equals or not name or len(parts) > 2 or not all(parts):
            raise click.BadParameter(f"{option!r} is not NAME=TRAIN[,VALIDATION].", param_hint="--data")
        for place, path in zip(("train", "validation"), parts, strict=False):
            overrides[f"data.{name}.{place}"] = path
    named = {"coordinator": options["coordinator"], "name": options["name"], "state_dir": options["state_dir"], **more}
    overrides.update({path: str(value) for path, value in named.items() if value is not None})
    chosen: Path | None = options["config_file"] or config.find_file(os.environ, Path.home())
    return config.load(chosen, os.environ, overrides)


def _join_line(given: str, characters_max: int) -> str:
    if given not in ("", "-"):
        return given
    if given == "" and sys.stdin.isatty():
        return str(click.prompt("Join line (not shown)", hide_input=True))
    return sys.stdin.readline(characters_max)


def _identity(config: AgentConfig) -> str:
    from fleetune.agent import joining
    from fleetune.wire import identity

    if config.plaintext:
        return "plaintext, on this machine only"
    found = identity.load(joining.folder(config))
    if found is None:
        return "none yet; `fleetune-agent join` makes one"
    trouble = identity.trouble(found.facts)
    return trouble or f"{found.facts.name}, for {found.facts.coordinator}, until {joining.date(found.facts.not_after_unix_s)}"


def _version() -> str:
    from importlib import metadata

    return metadata.version("fleetune")


def _say(text: str, error: bool = False) -> None:
    click.echo(text, err=error)


if __name__ == "__main__":
    main()
