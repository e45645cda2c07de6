"""Facts read off a machine."""

from __future__ import annotations

from pathlib import Path

from fleetune.agent.doctor import reading


def test_a_jetson_s_release_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    text = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n"
    (tmp_path / "etc/nv_tegra_release").write_text(text)
    assert reading.l4t(tmp_path) == "36.4.3"


def test_other_machines_have_no_such_file(tmp_path: Path) -> None:
    assert reading.l4t(tmp_path) == ""


def test_the_kernel_tells_of_its_clock_without_the_network() -> None:
    synchronised, error_s = reading.clock()
    assert synchronised in (True, False, None)
    assert error_s is None or error_s >= 0


def test_this_machine_s_own_facts_are_whole(tmp_path: Path) -> None:
    facts = reading.facts(tmp_path)
    assert facts.pointer_bytes == 8
    assert facts.memory_total_bytes > 0
    assert facts.disk_free_bytes > 0
    assert (facts.torch.version == "") or facts.torch.trouble or facts.torch.release >= (2, 0)
