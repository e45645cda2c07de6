"""Power and energy, on trees as boards show them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetune.agent.probe import energy, raspberry
from fleetune.agent.probe.energy import Counter, Power


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


RAPL = "sys/class/powercap/intel-rapl:"
PACKAGE = {f"{RAPL}0/name": "package-0", f"{RAPL}0/energy_uj": "5000000", f"{RAPL}0/max_energy_range_uj": "262143328850"}
CORE = {f"{RAPL}0:0/name": "core", f"{RAPL}0:0/energy_uj": "1000000", f"{RAPL}0:0/max_energy_range_uj": "262143328850"}
HWMON = "sys/class/hwmon/hwmon1/"
ORIN = {
    f"{HWMON}name": "ina3221",
    f"{HWMON}in1_label": "VDD_IN",
    f"{HWMON}in1_input": "5000",
    f"{HWMON}curr1_input": "1200",
    f"{HWMON}in2_label": "VDD_CPU_GPU_CV",
    f"{HWMON}in2_input": "5000",
    f"{HWMON}curr2_input": "400",
}
IIO = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/"
NANO = {f"{IIO}rail_name_0": "POM_5V_IN", f"{IIO}in_power0_input": "2345", f"{IIO}rail_name_1": "POM_5V_GPU", f"{IIO}in_power1_input": "40"}
PMIC = """   3V7_WL_SW_A current(0)=0.10000000A
   3V3_SYS_A current(1)=0.20000000A
   3V7_WL_SW_V volt(8)=3.70000000V
   3V3_SYS_V volt(9)=3.30000000V
   EXT5V_V volt(24)=5.12000000V
"""


def test_a_machine_without_sensors_says_none(tmp_path: Path) -> None:
    assert (energy.rapl(tmp_path), energy.power(tmp_path)) == ([], None)


def test_processor_packages_are_counted_and_their_parts_not_again(tmp_path: Path) -> None:
    assert energy.rapl(tree(tmp_path, {**PACKAGE, **CORE})) == [Counter("intel-rapl:0 package-0", 5_000_000, 262_143_328_850)]


def test_a_counter_that_this_user_may_not_read_is_none(tmp_path: Path) -> None:
    tree(tmp_path, PACKAGE)
    (tmp_path / f"{RAPL}0/energy_uj").unlink()
    assert energy.rapl(tmp_path) == []


def test_energy_is_the_difference_also_over_the_counter_s_end() -> None:
    assert energy.joules([Counter("a", 90, 100)], [Counter("a", 95, 100)]) == pytest.approx(5e-6)
    assert energy.joules([Counter("a", 90, 100)], [Counter("a", 5, 100)]) == pytest.approx(15e-6)


@pytest.mark.parametrize("after", [[], [Counter("b", 1, 100)]])
def test_readings_of_different_counters_make_no_energy(after: list[Counter]) -> None:
    assert energy.joules([Counter("a", 90, 100)], after) is None
    assert energy.joules([], []) is None


def test_an_orin_s_whole_board_rail_counts(tmp_path: Path) -> None:
    assert energy.power(tree(tmp_path, ORIN)) == Power(6.0, "board", "ina3221")


def test_an_older_jetson_shows_milliwatts(tmp_path: Path) -> None:
    assert energy.power(tree(tmp_path, NANO)) == Power(2.345, "board", "ina3221")


def test_a_monitor_without_the_board_s_rail_is_none(tmp_path: Path) -> None:
    files = {name: text for name, text in ORIN.items() if "1_" not in name}
    assert energy.power(tree(tmp_path, files)) is None


def test_a_pi_s_rails_with_both_readings_are_summed(tmp_path: Path) -> None:
    found = energy.power(tmp_path, PMIC)
    assert found is not None
    assert found.source == "pmic"
    assert found.watts == pytest.approx(0.1 * 3.7 + 0.2 * 3.3)


@pytest.mark.parametrize("text", ["", "error=1", "3V3_SYS_A current(1)=0.2A", "3V3_SYS_A current(1)=..A\n3V3_SYS_V volt(1)=3V"])
def test_a_pi_that_shows_no_rail_is_none(text: str) -> None:
    assert raspberry.pmic_watts(text) is None


def test_throttling_flags_are_told_in_words() -> None:
    assert raspberry.throttled("throttled=0x0\n") == ()
    assert raspberry.throttled("throttled=0x20002") == ("clock capped now", "clock was capped since the start")
    assert raspberry.throttled("error=2 error_msg=...") is None
