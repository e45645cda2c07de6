"""The agent's settings: file, environment, command line, and every mistake at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fleetune.agent import config
from fleetune.agent.config import DataPlace
from fleetune.complaints import ComplaintsError
from fleetune.errors import ConfigError

EXAMPLE = Path(__file__).resolve().parents[2] / "deploy/config/agent.toml"


def write(folder: Path, text: str) -> Path:
    file = folder / "agent.toml"
    file.write_text(text)
    return file


def complaints_of(file: Path | None, environment: dict[str, str], overrides: dict[str, object] | None = None) -> list[str]:
    with pytest.raises(ComplaintsError) as caught:
        config.load(file, environment, overrides)
    return [complaint.path for complaint in caught.value.complaints]


def test_the_commented_example_holds_the_defaults() -> None:
    example = config.load(EXAMPLE, {}, home=Path("/srv/ada"), host_name="pi")
    plain = config.load(None, {}, home=Path("/srv/ada"), host_name="pi")
    assert {**vars(example), "file": None} == vars(plain)
    assert (plain.name, plain.state_dir) == ("pi", Path("/srv/ada/.local/state/fleetune-agent"))


def test_what_the_example_comments_out_is_right_too(tmp_path: Path) -> None:
    lines = EXAMPLE.read_text("utf-8").splitlines()
    opened = [
        line.removeprefix("# ") if line.startswith(("# [", '# "', "# train", "# valid", "# format", "# name", "# state")) else line
        for line in lines
    ]
    loaded = config.load(write(tmp_path, "\n".join(opened)), {})
    assert loaded.name == "kitchen-pi"
    assert loaded.data["questions"] == DataPlace(tmp_path / "questions-train.jsonl", tmp_path / "questions-validation.jsonl", "jsonl")
    assert loaded.models == {"sentence-transformers/all-MiniLM-L6-v2": Path("/srv/models/minilm")}


def test_paths_count_from_the_file_s_folder_and_options_from_the_working_folder(tmp_path: Path) -> None:
    file = write(tmp_path, 'state_dir = "state"\n[data.a]\ntrain = "a.csv"\n')
    loaded = config.load(file, {}, {"data.b.train": "b.parquet"}, working_folder=Path("/work"))
    assert loaded.state_dir == tmp_path / "state"
    assert loaded.data == {"a": DataPlace(tmp_path / "a.csv", None, ""), "b": DataPlace(Path("/work/b.parquet"), None, "")}


def test_the_environment_goes_before_the_file_and_options_before_both(tmp_path: Path) -> None:
    file = write(tmp_path, "[training]\ncores = 1\n[limits]\nidle_only = false\n")
    environment = {"FLEETUNE_AGENT_TRAINING_CORES": "2", "FLEETUNE_AGENT_LIMITS_IDLE_ONLY": "yes", "FLEETUNE_AGENT_TAGS": "lab, orin"}
    loaded = config.load(file, environment, {"training.cores": 3})
    assert (loaded.training.cores, loaded.limits.idle_only, loaded.tags) == (3, True, ("lab", "orin"))


def test_names_with_dots_stay_whole() -> None:
    loaded = config.load(None, {}, {"models.org/name-v1.5": "/srv/m", "data.set.v2.train": "/x.jsonl"})
    assert loaded.models == {"org/name-v1.5": Path("/srv/m")}
    assert list(loaded.data) == ["set.v2"]


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        coordinator = "nowhere"
        nme = "a"
        training = 3
        tags = ["with space"]
        [data.unset]
        [data."b c"]
        train = "x.jsonl"
        [data.q]
        train = "a.txt"
        trian = "x"
        [limits]
        hours = ["25:00-1:00"]
        idle_cpu_percent = 101
        """,
    )
    assert complaints_of(file, {"FLEETUNE_AGENT_TRAINING_MEMORY_MIB": "much"}, {"limit.x": 3}) == [
        "coordinator",
        "nme",
        "training",
        "tags",
        "data.q.trian",
        "limits.hours",
        "limits.idle_cpu_percent",
        "FLEETUNE_AGENT_TRAINING_MEMORY_MIB",
        "limit.x",
        "data.unset",
        'data."b c"',
        "data.q.train",
    ]


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"agent\.toml cannot be read: No such file"):
        config.load(tmp_path / "agent.toml", {})
    with pytest.raises(ConfigError, match=r"agent\.toml is not valid TOML at line 2, column 5"):
        config.load(write(tmp_path, "\nname\n"), {})


def test_a_format_makes_up_for_an_ending_that_tells_nothing() -> None:
    assert config.load(None, {}, {"data.a.train": "/x.txt", "data.a.format": "csv"}).data["a"].format == "csv"


@pytest.mark.parametrize(
    ("host", "name"),
    [("kitchen-pi.local", "kitchen-pi"), ("Ada's Mac", "Ada-s-Mac"), ("", "device"), ("ü", "device"), ("x" * 99, "x" * 63)],
)
def test_a_host_name_becomes_a_device_name(host: str, name: str) -> None:
    assert config.name_from_host(host) == name


def test_state_lies_where_systemd_or_the_person_wants_it() -> None:
    home = Path("/srv/ada")
    assert config.default_state_dir({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}, home) == Path("/var/lib/a")
    assert config.default_state_dir({"XDG_STATE_HOME": "/state"}, home) == Path("/state/fleetune-agent")
    assert config.default_state_dir({"XDG_STATE_HOME": "relative"}, home) == home / ".local/state/fleetune-agent"


def test_the_configuration_is_found_where_a_person_keeps_it(tmp_path: Path) -> None:
    assert config.find_file({"FLEETUNE_AGENT_CONFIG": "/x.toml"}, tmp_path) == Path("/x.toml")
    own = tmp_path / ".config/fleetune/agent.toml"
    own.parent.mkdir(parents=True)
    own.write_text("")
    assert config.find_file({}, tmp_path) == own


def test_files_that_are_missing_now_are_told_without_refusing(tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("")
    loaded = config.load(
        None,
        {},
        {"data.a.train": f"{tmp_path}/there.jsonl", "data.a.validation": f"{tmp_path}/gone.jsonl", "models.org/m": f"{tmp_path}/gone"},
    )
    assert [complaint.path for complaint in config.missing_files(loaded)] == ["data.a.validation", 'models."org/m"']


def test_the_agent_s_settings_and_probes_import_nothing_heavy() -> None:
    code = (
        "import sys, fleetune.agent.config, fleetune.agent.identity, fleetune.agent.probe.telemetry, fleetune.agent.probe.profile, "
        "fleetune.agent.probe.owner\n"
        "print([name for name in ('numpy', 'pydantic', 'torch', 'grpc') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
