"""The coordinator's own settings: one row each, from coordinator.toml, the environment and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fleetune import settings
from fleetune.complaints import Complaint, ComplaintsError
from fleetune.settings import Kind, Setting
from fleetune.wire import channel

ENVIRONMENT_PREFIX = "FLEETUNE_COORDINATOR_"
CONFIG_VARIABLE = "FLEETUNE_COORDINATOR_CONFIG"


def _check_listen(text: str) -> str:
    try:
        channel.split_address(text)
    except ValueError:
        # Port 0 lets the system choose one; tests and the demo use that.
        host, _, port = text.rpartition(":")
        return "" if host and port == "0" else "HOST:PORT with a port from 0 to 65535 (0: any free one), for example 127.0.0.1:7433"
    return ""


def _check_address(text: str) -> str:
    if not text:
        return ""
    try:
        host, _ = channel.split_address(text)
    except ValueError:
        host = ""
    return "" if host and not is_wildcard(host) else "HOST:PORT that devices can dial, for example 192.0.2.7:7433"


def is_wildcard(host: str) -> bool:
    """Whether this stands for every address of the machine."""
    return host.strip("[]") in {"0.0.0.0", "::", "*"}  # compared, not listened on


_TLS_PATHS = ("tls.roots", "tls.certificate", "tls.key")

SETTINGS: tuple[Setting, ...] = (
    Setting("listen", Kind.TEXT, "127.0.0.1:7433", "Address on which agents and operators reach the coordinator.", check=_check_listen),
    Setting(
        "join_listen",
        Kind.TEXT,
        "",
        "Address on which those who have no certificate yet trade a token for one.",
        check=lambda text: _check_listen(text) if text else "",
        default_words="the host of `listen` with the next port",
    ),
    Setting(
        "address",
        Kind.TEXT,
        "",
        "HOST:PORT that devices dial, for join lines.",
        check=_check_address,
        default_words="what `fleetune init` was told, else `listen` with this machine's outgoing address for a wildcard",
    ),
    Setting("plaintext", Kind.SWITCH, False, "No TLS and no certificates: whoever reaches the address may do everything. Loopback only."),
    Setting(
        "state_dir",
        Kind.PLACE,
        "",
        "Folder for the database, blobs, adapters and logs; made at the first start.",
        default_words="`$STATE_DIRECTORY` of systemd, else `$XDG_STATE_HOME/fleetune`, else `~/.local/state/fleetune`",
    ),
    Setting("heartbeat_s", Kind.NUMBER, 5.0, "How often agents report that they live.", "seconds", 0.1, 3600),
    Setting(
        "lease_s", Kind.NUMBER, 15.0, "Silence after which a device counts as gone; at least twice the heartbeat.", "seconds", 0.2, 86_400
    ),
    Setting(
        "parallel_jobs",
        Kind.INTEGER,
        1,
        "Jobs that run at once; the others wait in line. A device trains for one at a time.",
        "jobs",
        1,
        1000,
    ),
    Setting(
        "transfers_at_once",
        Kind.INTEGER,
        3,
        "Updates and states on their way at once, not counting slow ones; the others wait. Bounds memory and keeps disks streaming.",
        "transfers",
        1,
        1024,
    ),
    Setting("max_update_mib", Kind.INTEGER, 4096, "Larger updates are refused before any memory or disk is taken.", "MiB", 1, 1_048_576),
    Setting(
        "keep_rounds", Kind.INTEGER, 3, "Latest rounds whose adapters are kept, besides the best and the final one.", "rounds", 1, 100_000
    ),
    Setting("certificate_days", Kind.INTEGER, 30, "How long certificates of devices and operators are good.", "days", 1, 397),
    Setting("drain_grace_s", Kind.NUMBER, 10.0, "At a stop, how long running uploads and folds may still take.", "seconds", 0, 3600),
    Setting(
        "tls.roots",
        Kind.PLACE,
        "",
        "Bring-your-own CA: PEM of the roots that devices and operators come from.",
        default_words="the fleet's own",
    ),
    Setting(
        "tls.certificate", Kind.PLACE, "", "Bring-your-own CA: PEM of the coordinator's certificate and its chain.", default_words="none"
    ),
    Setting(
        "tls.key", Kind.PLACE, "", "Bring-your-own CA: PEM of its key, unencrypted, readable by its owner alone.", default_words="none"
    ),
    Setting(
        "metrics.listen",
        Kind.TEXT,
        "",
        "Address on which Prometheus reads /metrics: plain HTTP on loopback, elsewhere TLS and metrics.bearer_file.",
        check=lambda text: _check_listen(text) if text else "",
        default_words="none, no metrics are served",
    ),
    Setting(
        "metrics.bearer_file",
        Kind.PLACE,
        "",
        "File with the secret that whoever reads the metrics has to send, readable by its owner alone.",
        default_words="none, on loopback alone",
    ),
    Setting("log.level", Kind.TEXT, "info", "How much is logged.", choices=("debug", "info", "warning", "error")),
    Setting(
        "log.format",
        Kind.TEXT,
        "auto",
        "text for people, json for collectors; auto is text on a terminal.",
        choices=("auto", "text", "json"),
    ),
)


@dataclass(frozen=True)
class TlsFiles:
    """What another authority made for this coordinator."""

    roots: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class CoordinatorConfig:
    """Every setting of a coordinator. `file` is None where there was none; `unused_environment` holds variables that no setting has."""

    listen: str
    join_listen: str
    """Never empty."""
    address: str
    """Empty: as `fleetune init` was told, or else of `listen`."""
    plaintext: bool
    state_dir: Path
    heartbeat_s: float
    lease_s: float
    parallel_jobs: int
    transfers_at_once: int
    max_update_bytes: int
    keep_rounds: int
    certificate_days: int
    tls: TlsFiles | None
    """Of another authority; None: the fleet has its own."""
    metrics_listen: str
    """Empty: no metrics are served."""
    metrics_bearer_file: Path | None
    drain_grace_s: float
    log_level: str
    log_format: str
    file: Path | None
    unused_environment: tuple[str, ...]


def load(
    path: Path | None,
    environment: Mapping[str, str],
    overrides: Mapping[str, object] | None = None,
    *,
    home: Path | None = None,
    working_folder: Path | None = None,
) -> CoordinatorConfig:
    """The settings of `path` (or of none), changed by FLEETUNE_COORDINATOR_* variables and then by `overrides` keyed by dotted path.

    Raises ComplaintsError with everything that is wrong, ConfigError for a file that cannot be read or is no TOML.
    """
    working_folder = Path.cwd() if working_folder is None else working_folder
    document = settings.read_file(path) if path is not None else {}
    folder = working_folder if path is None else (working_folder / path).parent
    own = {name: text for name, text in environment.items() if name != CONFIG_VARIABLE}
    found = settings.read(SETTINGS, settings.Sources(document, folder, own, ENVIRONMENT_PREFIX, overrides or {}, working_folder))
    complaints = [*found.complaints, *_rules(found)]
    if complaints:
        raise ComplaintsError(str(path) if path is not None else "the coordinator's configuration", complaints)
    return CoordinatorConfig(
        listen=found.text("listen"),
        join_listen=found.text("join_listen") or _next_port(found.text("listen")),
        address=found.text("address"),
        plaintext=found.switch("plaintext"),
        state_dir=found.place("state_dir") or default_state_dir(environment, Path.home() if home is None else home),
        heartbeat_s=found.number("heartbeat_s"),
        lease_s=found.number("lease_s"),
        parallel_jobs=found.integer("parallel_jobs"),
        transfers_at_once=found.integer("transfers_at_once"),
        max_update_bytes=found.integer("max_update_mib") * 1024**2,
        keep_rounds=found.integer("keep_rounds"),
        certificate_days=found.integer("certificate_days"),
        tls=_tls_files(found),
        metrics_listen=found.text("metrics.listen"),
        metrics_bearer_file=found.place("metrics.bearer_file"),
        drain_grace_s=found.number("drain_grace_s"),
        log_level=found.text("log.level"),
        log_format=found.text("log.format"),
        file=path,
        unused_environment=found.unused_environment,
    )


def find_file(environment: Mapping[str, str], home: Path) -> Path | None:
    """The configuration to read when none is named: $FLEETUNE_COORDINATOR_CONFIG, the person's own, the machine's; None without any."""
    named = environment.get(CONFIG_VARIABLE)
    if named:
        return Path(named)
    own = Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "fleetune" / "coordinator.toml"
    return next((path for path in (own, Path("/etc/fleetune/coordinator.toml")) if path.is_file()), None)


def default_state_dir(environment: Mapping[str, str], home: Path) -> Path:
    """Where state lies when no setting says so. systemd names a folder of its own when its unit has StateDirectory=."""
    of_unit = environment.get("STATE_DIRECTORY", "").partition(":")[0]
    if of_unit:
        return Path(of_unit)
    of_person = environment.get("XDG_STATE_HOME", "")
    return (Path(of_person) if of_person.startswith("/") else home / ".local" / "state") / "fleetune"


def _next_port(listen: str) -> str:
    host, _, port = listen.rpartition(":")
    return f"{host}:{int(port) + 1 if int(port) else 0}"


def _tls_files(found: settings.Settings) -> TlsFiles | None:
    roots, certificate, key = (found.place(name) for name in _TLS_PATHS)
    return TlsFiles(roots, certificate, key) if roots and certificate and key else None


def _rules(found: settings.Settings) -> list[Complaint]:
    complaints: list[Complaint] = []
    wrong = {complaint.path for complaint in found.complaints}
    listen = found.text("listen")
    if "listen" not in wrong and found.switch("plaintext") and not channel.is_loopback(listen.rpartition(":")[0]):
        complaints.append(
            Complaint(
                "listen",
                f'"{listen}"',
                "with plaintext, a loopback address such as 127.0.0.1:7433",
                "Leave plaintext out: `fleetune init` makes what TLS needs, in a second.",
            )
        )
    given = [name for name in _TLS_PATHS if found.place(name) is not None]
    if given and len(given) < len(_TLS_PATHS):
        missing = [name for name in _TLS_PATHS if name not in given]
        complaints.append(Complaint(given[0], "", "all three of " + ", ".join(_TLS_PATHS), f"Set {' and '.join(missing)}, too."))
    if given and found.switch("plaintext"):
        complaints.append(Complaint("plaintext", "true", "false where tls.* is set", "Leave out one of the two."))
    scraped = found.text("metrics.listen")
    if scraped and "metrics.listen" not in wrong and not channel.is_loopback(scraped.rpartition(":")[0]):
        if found.switch("plaintext"):
            remedy = "Leave plaintext out: the metrics are served with the coordinator's own certificate then."
            complaints.append(
                Complaint("metrics.listen", f'"{scraped}"', "with plaintext, a loopback address such as 127.0.0.1:9464", remedy)
            )
        elif found.place("metrics.bearer_file") is None:
            remedy = "Set metrics.bearer_file to a file with a long random line (`openssl rand -hex 32`), mode 0600."
            complaints.append(Complaint("metrics.listen", f'"{scraped}"', "a loopback address, or with metrics.bearer_file", remedy))
    if not found.text("join_listen") and listen.endswith(":65535") and "listen" not in wrong:
        complaints.append(Complaint("listen", f'"{listen}"', "a port below 65535", "The next port is for joining; or set join_listen."))
    heartbeat_s, lease_s = found.number("heartbeat_s"), found.number("lease_s")
    if not wrong & {"heartbeat_s", "lease_s"} and lease_s < 2 * heartbeat_s:
        complaints.append(
            Complaint(
                "lease_s",
                f"{lease_s:g}",
                f"at least {2 * heartbeat_s:g}, twice heartbeat_s",
                "Raise it: one lost heartbeat is no lost device.",
            )
        )
    return complaints
