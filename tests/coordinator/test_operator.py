"""An operator's identity: where it is looked for, what is refused, and how it is made of a join line."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fleetune.coordinator import operator
from fleetune.errors import ConfigError
from fleetune.wire import identity
from fleetune.wire.identity import Identity
from fleetune.wire.joinline import JoinLine
from support.authority import DAY_S, Authority, Leaf, Purpose
from support.join_service import TOKEN, Door, joining


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def an_operator(authority: Authority, *, begin_unix_s: float | None = None) -> Identity:
    made = authority.agent("ada", begin_unix_s=begin_unix_s, coordinator="192.0.2.7:7433")
    return replace(made, facts=replace(made.facts, kind="operator", role="admin"))


def test_the_option_comes_before_the_environment_and_that_before_the_person_s_own_folder(tmp_path: Path) -> None:
    home = Path("/srv/ada")
    assert operator.find(tmp_path, {"FLEETUNE_IDENTITY": "/elsewhere"}, home) == tmp_path
    assert operator.find(None, {"FLEETUNE_IDENTITY": "/elsewhere"}, home) == Path("/elsewhere")
    assert operator.find(None, {"XDG_CONFIG_HOME": "/conf"}, home) == Path("/conf/fleetune/identity")
    assert operator.find(None, {}, home) == Path("/srv/ada/.config/fleetune/identity")


def test_without_an_identity_it_is_said_where_one_comes_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        operator.load(tmp_path)
    assert "fleetune init" in str(caught.value) and "fleetune join" in str(caught.value)


def test_an_identity_that_is_over_or_a_device_s_is_refused(tmp_path: Path, authority: Authority) -> None:
    identity.store(tmp_path / "old", an_operator(authority, begin_unix_s=time.time() - 90 * DAY_S))
    with pytest.raises(ConfigError, match="ended on"):
        operator.load(tmp_path / "old")
    identity.store(tmp_path / "device", authority.agent())
    with pytest.raises(ConfigError, match="of agent 'one', not of an operator"):
        operator.load(tmp_path / "device")


def test_a_key_that_others_may_read_is_refused(tmp_path: Path, authority: Authority) -> None:
    identity.store(tmp_path, an_operator(authority))
    (tmp_path / identity.KEY_FILE).chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others"):
        operator.load(tmp_path)


def test_a_coordinator_is_found_in_the_identity_unless_one_is_named(tmp_path: Path, authority: Authority) -> None:
    identity.store(tmp_path, an_operator(authority))
    assert operator.reach(None, False, tmp_path).address == "192.0.2.7:7433"
    assert operator.reach("127.0.0.1:9", False, tmp_path).address == "127.0.0.1:9"


def test_plaintext_needs_no_identity_and_stays_on_this_machine(tmp_path: Path) -> None:
    assert operator.reach(None, True, tmp_path) == operator.Way("127.0.0.1:7433", None)
    assert operator.reach("[::1]:9", True, tmp_path).identity is None
    with pytest.raises(ConfigError, match="is another"):
        operator.reach("192.0.2.7:7433", True, tmp_path)


async def test_a_line_makes_an_identity_once(tmp_path: Path, authority: Authority) -> None:
    async with joining(Door(authority)) as port:
        line = JoinLine("127.0.0.1:7433", port, authority.root_sha256, TOKEN)
        made = await asyncio.to_thread(operator.join, line, "ada", tmp_path / "identity")
        assert operator.load(tmp_path / "identity") == made
        assert (made.facts.name, made.facts.role) == ("ada", "operate")
        with pytest.raises(ConfigError, match=r"'ada' at 127\.0\.0\.1:7433"):
            await asyncio.to_thread(operator.join, line, "ada", tmp_path / "identity")
        again = await asyncio.to_thread(lambda: operator.join(line, "ada", tmp_path / "identity", again=True))
    assert again.key != made.key


def test_a_damaged_identity_is_not_overwritten_either(tmp_path: Path, authority: Authority) -> None:
    identity.store(tmp_path, an_operator(authority))
    (tmp_path / identity.FACTS_FILE).write_text("{")
    with pytest.raises(ConfigError, match="cannot be used"):
        operator.refuse_overwriting(tmp_path, again=False)
    operator.refuse_overwriting(tmp_path, again=True)


def files(folder: Path, authority: Authority, leaf: Leaf) -> operator.Files:
    """As an authority of one's own hands them out."""
    folder.mkdir()
    for name, data in (("ada.pem", leaf.certificate), ("ada.key", leaf.key), ("ca.pem", authority.root)):
        (folder / name).write_bytes(data)
    return operator.Files(folder / "ada.pem", folder / "ada.key", folder / "ca.pem")


def test_a_certificate_of_another_authority_is_taken_for_an_operator_s_only(tmp_path: Path, authority: Authority) -> None:
    ada = files(tmp_path / "ada", authority, authority.leaf("ada", "urn:fleetune:operator:view", "client"))
    made = operator.bring(ada, "fleet.example:7433", tmp_path / "identity")
    assert (made.facts.name, made.facts.role, operator.load(tmp_path / "identity")) == ("ada", "view", made)
    with pytest.raises(ConfigError, match="holds an identity"):
        operator.bring(ada, "fleet.example:7433", tmp_path / "identity")
    operator.bring(ada, "other.example:7433", tmp_path / "identity", again=True)
    assert operator.reach(None, False, tmp_path / "identity").address == "other.example:7433"


@pytest.mark.parametrize(
    ("name", "uri", "purpose", "begin_s", "words"),
    [
        ("pi-1", "urn:fleetune:agent", "client", 0.0, "not of an operator"),
        ("ada", "urn:fleetune:operator:king", "client", 0.0, "no agent's and no operator's"),
        ("ada", "urn:fleetune:operator:view", "server", 0.0, "does not say whose it is"),
        ("Ada L.!", "urn:fleetune:operator:view", "client", 0.0, "takes for nobody"),
        ("ada", "urn:fleetune:operator:view", "client", -90 * DAY_S, "ended on"),
    ],
)
def test_a_certificate_that_the_coordinator_would_refuse_is_not_taken(
    tmp_path: Path, authority: Authority, name: str, uri: str, purpose: Purpose, begin_s: float, words: str
) -> None:
    leaf = authority.leaf(name, uri, purpose, begin_unix_s=time.time() - 300 + begin_s)
    with pytest.raises(ConfigError, match=words):
        operator.bring(files(tmp_path / "ada", authority, leaf), "fleet.example:7433", tmp_path / "identity")
    assert not (tmp_path / "identity").exists()


def test_files_that_are_missing_or_do_not_fit_are_named(tmp_path: Path, authority: Authority) -> None:
    given = files(tmp_path / "ada", authority, authority.leaf("ada", "urn:fleetune:operator:view", "client"))
    given.key.write_bytes(authority.leaf("eve", "urn:fleetune:operator:view", "client").key)
    with pytest.raises(ConfigError, match="for another key"):
        operator.bring(given, "fleet.example:7433", tmp_path / "identity")
    given.roots.unlink()
    with pytest.raises(ConfigError, match=r"ca\.pem cannot be read: No such file"):
        operator.bring(given, "fleet.example:7433", tmp_path / "identity")
