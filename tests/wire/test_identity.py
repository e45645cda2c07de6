"""Identities on disk: stored durably and privately, refused where they are damaged or open to others."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from fleetune.errors import ConfigError
from fleetune.wire import channel, identity, joinline

FACTS = identity.Facts("agent", "kitchen-pi", "", "192.0.2.7:7433", identity.SERVER_NAME, 1000.0, 4000.0)
IDENTITY = identity.Identity(FACTS, b"key", b"certificate", b"roots")
LINE = joinline.JoinLine("192.0.2.7:7433", 7434, bytes(range(32)), "dG9rZW4tb2YtYS1mbGVldA")


def test_what_is_stored_is_loaded_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    identity.store(tmp_path / "identity", IDENTITY)
    assert identity.load(tmp_path / "identity") == IDENTITY
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "identity").iterdir()} == {0o600}
    assert stat.S_IMODE((tmp_path / "identity").stat().st_mode) == 0o700


def test_storing_again_replaces_all_and_leaves_nothing_else(tmp_path: Path) -> None:
    identity.store(tmp_path, IDENTITY)
    identity.store(tmp_path, replace(IDENTITY, key=b"newer"))
    found = identity.load(tmp_path)
    assert found is not None
    assert found.key == b"newer"
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("step", range(1, 6))
def test_cut_off_at_any_step_the_old_identity_or_the_new_one_is_there_and_never_a_mix(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = identity.Identity(replace(FACTS, not_after_unix_s=9000.0), b"new key", b"new certificate", b"new roots")
    identity.store(tmp_path, IDENTITY)
    rename, renamed = os.replace, 0

    def cut(source: Path, target: Path) -> None:
        nonlocal renamed
        renamed += 1
        if renamed == step:
            raise OSError(errno.EIO, "cut off")
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", cut)
        with pytest.raises(OSError, match="cut off"):
            identity.store(tmp_path, newer)
    assert identity.load(tmp_path) == (IDENTITY if step == 1 else newer)
    assert identity.load(tmp_path) == (IDENTITY if step == 1 else newer)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_pending_file_is_refused_by_name(tmp_path: Path) -> None:
    identity.store(tmp_path, IDENTITY)
    (tmp_path / identity.PENDING_FILE).touch(0o600)
    with pytest.raises(ConfigError, match=r"pending\.json is damaged"):
        identity.load(tmp_path)


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert identity.load(tmp_path) is None


def test_a_key_that_others_may_read_is_refused_by_name(tmp_path: Path) -> None:
    identity.store(tmp_path, IDENTITY)
    (tmp_path / identity.KEY_FILE).chmod(0o644)
    with pytest.raises(ConfigError, match=r"key\.pem can be read by others \(mode 0644\)"):
        identity.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "king"}', '{"kind": "agent", "name": 7}', "[" * 5000])
def test_damaged_facts_are_refused_with_the_file_and_the_remedy(tmp_path: Path, text: str) -> None:
    identity.store(tmp_path, IDENTITY)
    (tmp_path / identity.FACTS_FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"identity\.json is damaged .* Join again"):
        identity.load(tmp_path)


def test_a_missing_certificate_is_named(tmp_path: Path) -> None:
    identity.store(tmp_path, IDENTITY)
    (tmp_path / identity.CERTIFICATE_FILE).unlink()
    with pytest.raises(ConfigError, match=r"certificate\.pem is missing"):
        identity.load(tmp_path)


def test_the_key_is_in_no_text_of_an_identity() -> None:
    assert "key" not in repr(IDENTITY)


def test_dates_outside_the_certificates_are_told_with_both_clocks() -> None:
    assert "ended on 1970-01-01 01:06 UTC" in identity.trouble(FACTS, 5000.0)
    assert "begins on 1970-01-01 00:16 UTC" in identity.trouble(FACTS, 10.0)
    assert identity.trouble(FACTS, 2000.0) == ""


def test_renewal_is_due_at_two_thirds_of_the_life() -> None:
    assert identity.renewal_due_unix_s(FACTS) == 3000.0


def test_plaintext_leaves_this_machine_under_no_circumstances() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.7:7433 is not this machine"):
        channel.open_channel("192.0.2.7:7433")


@pytest.mark.parametrize("address", ["192.0.2.7:7433", "[2001:db8::7]:7433", "fleet.example.org:1"])
def test_a_join_line_reads_back(address: str) -> None:
    line = replace(LINE, address=address)
    assert joinline.parse(f"  {line.text()}\n") == line
    assert line.join_address == address.rpartition(":")[0] + ":7434"
    assert line.token not in repr(line)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "does not begin with ft1/"),
        ("ft2/192.0.2.7:7433/7434/x/y", "does not begin with ft1/"),
        ("ft1/192.0.2.7:7433/7434", "3 parts"),
        (LINE.text().replace("7433", "0"), "is not HOST:PORT"),
        (LINE.text().replace("/7434/", "/70000/"), "'70000' is no port"),
        (LINE.text().replace("AAEC", ""), "fingerprint is cut"),
        (LINE.text() + "=;", "token is damaged"),
    ],
)
def test_a_damaged_join_line_is_refused_without_repeating_the_token(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        joinline.parse(text)
    assert LINE.token not in str(caught.value)
