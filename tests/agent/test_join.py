"""`fleetune-agent join`, as typed, against a real server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner, Result

from fleetune.agent import cli
from fleetune.errors import ConfigError
from fleetune.wire import enrolment, identity
from fleetune.wire.joinline import JoinLine
from support.authority import Authority, Purpose
from support.join_service import TOKEN, Door, joining


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


async def typed(tmp_path: Path, line: JoinLine | str, *words: str, piped: bool = True) -> Result:
    text = line if isinstance(line, str) else line.text()
    environment: dict[str, str | None] = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": None, "FLEETUNE_AGENT_CONFIG": None}
    arguments = ["join", "--state-dir", str(tmp_path / "state"), *words, *([] if piped else [text])]
    invoke = CliRunner().invoke
    return await asyncio.to_thread(
        lambda: invoke(cli.cli, arguments, input=f"{text}\n" if piped else None, env=environment, standalone_mode=False)
    )


def line_to(port: int, authority: Authority) -> JoinLine:
    return JoinLine("127.0.0.1:7433", port, authority.root_sha256, TOKEN)


@pytest.mark.parametrize("piped", [True, False])
async def test_a_line_on_standard_input_or_in_the_arguments_makes_an_identity(tmp_path: Path, authority: Authority, piped: bool) -> None:
    door = Door(authority)
    async with joining(door) as port:
        done = await typed(tmp_path, line_to(port, authority), "--name", "pi-1", "--json", piped=piped)
    report = json.loads(done.output)
    assert (done.return_value, report["name"], report["coordinator"]) == (0, "pi-1", "127.0.0.1:7433")
    assert TOKEN not in done.output
    made = identity.load(tmp_path / "state" / "identity")
    assert made is not None and (made.facts.kind, made.facts.name) == ("agent", "pi-1")
    assert door.joins[0].device_id == (tmp_path / "state" / "device-id").read_text().strip()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "state" / "identity").iterdir()} == {0o600}


async def test_an_identity_is_replaced_only_when_asked_and_the_device_keeps_its_id(tmp_path: Path, authority: Authority) -> None:
    door = Door(authority)
    async with joining(door) as port:
        await typed(tmp_path, line_to(port, authority), "--name", "pi-1")
        refused = await typed(tmp_path, line_to(port, authority), "--name", "pi-1")
        assert isinstance(refused.exception, ConfigError)
        assert "'pi-1', in the fleet of 127.0.0.1:7433" in str(refused.exception) and "--again" in str(refused.exception)
        assert len(door.joins) == 1
        before = identity.load(tmp_path / "state" / "identity")
        again = await typed(tmp_path, line_to(port, authority), "--name", "pi-2", "--again")
    assert "pi-2 has joined the fleet of 127.0.0.1:7433" in again.output
    after = identity.load(tmp_path / "state" / "identity")
    assert before is not None and after is not None and before.key != after.key
    assert door.joins[0].device_id == door.joins[1].device_id


async def test_a_refused_token_leaves_no_identity_and_is_told_nowhere(tmp_path: Path, authority: Authority) -> None:
    door = Door(authority, answers=[(grpc.StatusCode.UNAUTHENTICATED, f"no such token: {TOKEN}")])
    async with joining(door) as port:
        done = await typed(tmp_path, line_to(port, authority), "--name", "pi-1")
    assert isinstance(done.exception, enrolment.JoinRefusedError)
    assert cli.exit_code(done.exception) == 4
    assert TOKEN not in f"{done.output}{done.exception}"
    assert not (tmp_path / "state" / "identity").exists()


async def test_somebody_in_between_gets_no_token_and_makes_no_identity(tmp_path: Path, authority: Authority) -> None:
    door = Door(Authority("somebody in between"))
    async with joining(door) as port:
        done = await typed(tmp_path, line_to(port, authority), "--name", "pi-1")
    assert isinstance(done.exception, enrolment.WrongCoordinatorError)
    assert cli.exit_code(done.exception) == 4
    assert door.joins == []
    assert not (tmp_path / "state" / "identity").exists()


@pytest.mark.parametrize("line", ["", "hello", "ft1/127.0.0.1:7433/7434/short/a-token-of-a-test-000000"])
async def test_a_line_that_is_none_is_told_without_repeating_it(tmp_path: Path, line: str) -> None:
    done = await typed(tmp_path, line, "--name", "pi-1")
    assert isinstance(done.exception, ConfigError)
    assert "a-token-of-a-test" not in str(done.exception)


async def test_run_refuses_a_name_other_than_the_certificate_s(tmp_path: Path, authority: Authority) -> None:
    identity.store(tmp_path / "state" / "identity", authority.agent("pi-1"))
    environment: dict[str, str | None] = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": None, "FLEETUNE_AGENT_CONFIG": None}
    words = ["run", "--state-dir", str(tmp_path / "state"), "--name", "pi-2"]
    done = CliRunner().invoke(cli.cli, words, env=environment, standalone_mode=False)
    assert isinstance(done.exception, ConfigError)
    assert "'pi-2'" in str(done.exception) and "'pi-1'" in str(done.exception)


def test_run_refuses_plaintext_to_another_machine(tmp_path: Path) -> None:
    environment: dict[str, str | None] = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": None, "FLEETUNE_AGENT_CONFIG": None}
    words = ["run", "--state-dir", str(tmp_path / "state"), "--plaintext", "--coordinator", "192.0.2.7:7433"]
    done = CliRunner().invoke(cli.cli, words, env=environment, standalone_mode=False)
    assert isinstance(done.exception, ConfigError)
    assert "plaintext" in str(done.exception)


async def test_a_certificate_of_another_authority_is_taken_instead_of_a_line(tmp_path: Path, authority: Authority) -> None:
    leaf = authority.leaf("pi-1", "urn:fleetune:agent", "client")
    for name, data in (("c.pem", leaf.certificate), ("k.pem", leaf.key), ("r.pem", authority.root)):
        (tmp_path / name).write_bytes(data)
    files = [f"--{option}={tmp_path / name}" for option, name in (("certificate", "c.pem"), ("key", "k.pem"), ("roots", "r.pem"))]
    refused = await typed(tmp_path, "", *files)
    assert "--coordinator" in str(refused.exception)
    done = await typed(tmp_path, "", *files, "--coordinator", "fleet.example:7433")
    assert "pi-1 has joined the fleet of fleet.example:7433" in done.output
    made = identity.load(tmp_path / "state" / "identity")
    assert made is not None and (made.facts.name, made.facts.server_name, made.key) == ("pi-1", "", leaf.key)


@pytest.mark.parametrize(
    ("uri", "purpose", "words"),
    [
        ("", "client", "does not say whose it is"),
        ("urn:fleetune:agent", "server", "does not say whose it is"),
        ("urn:fleetune:operator:admin", "client", "of operator 'pi-1'"),
        ("urn:fleetune:operator:king", "client", "no agent's and no operator's"),
        ("urn:fleetune:agent:another-device", "client", "this device has"),
    ],
)
async def test_a_certificate_that_is_not_this_device_s_is_refused(
    tmp_path: Path, authority: Authority, uri: str, purpose: Purpose, words: str
) -> None:
    leaf = authority.leaf("pi-1", uri, purpose)
    for name, data in (("c.pem", leaf.certificate), ("k.pem", leaf.key), ("r.pem", authority.root)):
        (tmp_path / name).write_bytes(data)
    files = [f"--{option}={tmp_path / name}" for option, name in (("certificate", "c.pem"), ("key", "k.pem"), ("roots", "r.pem"))]
    done = await typed(tmp_path, "", *files, "--coordinator", "fleet.example:7433")
    assert isinstance(done.exception, ConfigError)
    assert words in str(done.exception)
    assert not (tmp_path / "state" / "identity").exists()
