"""Fuzzing of everything that reads bytes from elsewhere: tensor files, chunks, settings, messages, the children's lines.

    .venv/bin/python bench/fuzz.py --executions 1000000 --seed 1 [--target spool] [--write docs/benchmarks.md]
    .venv/bin/python bench/fuzz.py --target spool --replay FILE

The targets and what they promise are tests/support/fuzz_targets.py and fuzz_methods.py. Where atheris is installed (libFuzzer, guided
by coverage), it has the first tenth of the executions, half of its mutations by our own mutator, which knows the words of each format.
The rest is that mutator alone on what was kept before, at about ten times the rate. Each runs in a process of its own. Coverage is
measured afterwards, by running all that was kept.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

BEGIN, END = "<!-- fuzz:begin -->", "<!-- fuzz:end -->"
INPUT_BYTES_MAX = 8192
GUIDED_PART = 10
CRASHED = 77
_FOUND = (CRASHED, 70, 71)  # libFuzzer's: a crash, a hang, too much memory
_ENGINES = {
    "both": "Engine: atheris, guided by coverage, for the first tenth of the executions; then our own mutator on what that kept.",
    "atheris": "Engine: atheris, guided by coverage.",
    "plain": "Engine: our own mutator, guided by the kinds of answers.",
}
_DONE = re.compile(r"Done (\d+) runs in (\d+) second")


@dataclass(frozen=True)
class Report:
    """What one target did."""

    target: str
    executions: int
    seconds: float
    kept: int
    memory_peak_bytes: int
    coverage: dict[str, tuple[int, int]]
    """Module -> lines and branches reached, and all there are."""
    crashes: tuple[str, ...]


def main() -> int:
    arguments = _arguments()
    if arguments.worker:
        return _work(arguments)
    if arguments.measure is not None:
        return _measure(arguments)
    if arguments.replay is not None:
        return _replay(arguments.target[0], arguments.replay)
    names = _targets()
    unknown = set(arguments.target) - names.keys()
    if unknown:
        raise SystemExit(f"no target {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = arguments.target or list(names)
    shares = {name: names[name][0] for name in chosen}
    print(f"engine: {arguments.engine}; machine: {_machine()}; command: python {' '.join(sys.argv)}", flush=True)
    reports: list[Report] = []
    for name, share in shares.items():
        report = _run(name, names[name][1], math.ceil(arguments.executions * share / sum(shares.values())), arguments)
        reports.append(report)
        print(_told(report), flush=True)
    total, seconds = sum(report.executions for report in reports), sum(report.seconds for report in reports)
    crashes = [crash for report in reports for crash in report.crashes]
    print(f"in all: {total} executions in {seconds:.0f} s, {len(crashes)} crashes")
    if arguments.write is not None:
        _write(arguments.write, reports, arguments)
    return 1 if crashes else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=1_000_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", action="append", default=[], help="only this one; may be given again")
    parser.add_argument("--engine", choices=("both", "atheris", "plain"), default=_default_engine())
    parser.add_argument(
        "--crashes", type=Path, default=Path(tempfile.gettempdir()) / "fleetune-fuzz", help="where crashing inputs are kept"
    )
    parser.add_argument("--replay", type=Path, default=None, metavar="FILE", help="run one input and show what happens")
    parser.add_argument("--write", type=Path, default=None, metavar="PAGE", help="put the figures into this page")
    parser.add_argument("--modules", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def _default_engine() -> str:
    return "both" if importlib.util.find_spec("atheris") else "plain"


def _targets() -> dict[str, tuple[int, list[str]]]:
    """Each target's share and modules. Processes that measure are told them: what is imported before they look gets no counters."""
    from support import fuzz_table

    return {name: (kind.share, list(kind.modules)) for name, kind in fuzz_table.TARGETS.items()}


def _run(name: str, modules: Sequence[str], executions: int, arguments: argparse.Namespace) -> Report:
    """Fuzz one target, each engine in a process of its own, then measure in another one what the corpus reaches."""
    arguments.crashes.mkdir(parents=True, exist_ok=True)
    guided = {"both": executions // GUIDED_PART, "atheris": executions, "plain": 0}[arguments.engine]
    with tempfile.TemporaryDirectory(prefix="fuzz-corpus-") as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        common = ["--target", name, "--seed", str(arguments.seed), "--crashes", str(arguments.crashes), "--corpus", str(corpus)]
        common += ["--modules", *modules]
        before = set(arguments.crashes.iterdir())
        begin = time.monotonic()
        runs = sum(_engine(engine, share, common) for engine, share in (("atheris", guided), ("plain", executions - guided)) if share > 0)
        seconds = time.monotonic() - begin
        found = sorted(str(path) for path in set(arguments.crashes.iterdir()) - before)
        for path in found:
            print(f"replay: python bench/fuzz.py --target {name} --replay {path}")
        out = Path(folder) / "measured.json"
        subprocess.run([sys.executable, __file__, *common, "--measure", str(out)], check=True)
        measured = json.loads(out.read_text())
        coverage = {module: (reached, there) for module, (reached, there) in measured["coverage"].items()}
        return Report(name, runs, seconds, measured["kept"], measured["memory_peak_bytes"], coverage, tuple(found))


def _engine(engine: str, executions: int, common: Sequence[str]) -> int:
    """Executions done; what a crash says is shown."""
    command = [sys.executable, __file__, *common, "--worker", "--executions", str(executions), "--engine", engine]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as ended:
        said = ended.communicate()[0].decode("utf-8", "replace")
    _clear(ended.pid)
    done = _DONE.search(said)
    if ended.returncode == 0 and done is not None:
        return int(done.group(1))
    print(said[-4000:])
    if ended.returncode not in _FOUND:
        raise SystemExit(f"the engine {engine} ended with {ended.returncode}")
    return int(done.group(1)) if done else 0


def _clear(pid: int) -> None:
    """libFuzzer ends the process without a word to Python: the target's folder stays."""
    from support import fuzz_targets

    for folder in fuzz_targets.FOLDERS.glob(f"fuzz-{pid}-*"):
        shutil.rmtree(folder)


def _work(arguments: argparse.Namespace) -> int:
    if arguments.engine == "atheris":
        _atheris(arguments)
    from support import fuzz_engine, fuzz_table

    target = fuzz_table.TARGETS[arguments.target[0]]()
    try:
        known = [path.read_bytes() for path in sorted(arguments.corpus.iterdir())]
        outcome = fuzz_engine.fuzz(target, arguments.executions, arguments.seed, known=known)
    finally:
        target.close()
    for data in outcome.corpus:
        _keep(arguments.corpus, "", data)
    for crash in outcome.crashes:
        traceback.print_exception(crash.error)
        _keep(arguments.crashes, "crash-", crash.data)
    print(f"Done {outcome.executions} runs in {outcome.seconds:.0f} second(s)")
    return CRASHED if outcome.crashes else 0


def _atheris(arguments: argparse.Namespace) -> NoReturn:
    import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]  # no stubs, and not installed everywhere

    name = arguments.target[0]
    engine: Any = atheris
    # What is imported inside is given counters: only the readers, or the counters of libraries would guide the engine.
    with engine.instrument_imports(include=arguments.modules, enable_loader_override=False):
        from support import fuzz_engine, fuzz_table

        target = fuzz_table.TARGETS[name]()
    mutate = fuzz_engine.mutator(target.words)
    seeds = list(target.seeds())
    executed = 0

    def one(data: bytes) -> None:
        nonlocal executed
        executed += 1
        fuzz_engine.execute(target, data, executed % fuzz_engine.MEMORY_EVERY == 0, hang_s=0)

    def mutated(data: bytes, size_max: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return bytes(engine.Mutate(data, size_max))
        return mutate(rng, data, rng.choice(seeds))[:size_max]

    for seed in seeds:
        _keep(arguments.corpus, "", seed)
    options = {
        "runs": arguments.executions,
        "seed": arguments.seed,
        "max_len": INPUT_BYTES_MAX,
        "timeout": int(fuzz_engine.HANG_S * fuzz_engine.BLOCKED_FACTOR),
        "artifact_prefix": f"{arguments.crashes}{os.sep}{name}-",
        "print_final_stats": 1,
        "verbosity": 1,
        "len_control": 0,
    }
    warnings.simplefilter("error")
    engine.Setup([sys.argv[0], *(f"-{key}={value}" for key, value in options.items()), str(arguments.corpus)], one, custom_mutator=mutated)
    engine.Fuzz()
    raise AssertionError("the engine ends the process")


def _measure(arguments: argparse.Namespace) -> int:
    """Run the corpus once more under coverage and with the memory measured."""
    import coverage

    modules = arguments.modules
    measuring = coverage.Coverage(branch=True, data_file=None, source_pkgs=modules, config_file=False)
    measuring.start()
    from support import fuzz_engine, fuzz_table

    target = fuzz_table.TARGETS[arguments.target[0]]()
    peak = 0
    inputs = [*target.seeds(), *(path.read_bytes() for path in sorted(arguments.corpus.iterdir()))]
    try:
        for data in inputs:
            target.run(data)
    finally:
        measuring.stop()
    for data in inputs:
        peak = max(peak, fuzz_engine.execute(target, data, True)[1])
    target.close()
    found: dict[str, tuple[int, int]] = {}
    for module in modules:
        source = sys.modules[module].__file__
        assert source is not None
        numbers: Any = measuring._analyze(source).numbers  # the public reports only write text
        found[module] = (
            numbers.n_executed + numbers.n_executed_branches,
            numbers.n_statements + numbers.n_branches,
        )
    arguments.measure.write_text(json.dumps({"coverage": found, "kept": len(inputs), "memory_peak_bytes": peak}))
    return 0


def _replay(name: str, path: Path) -> int:
    from support import fuzz_engine, fuzz_table

    target = fuzz_table.TARGETS[name]()
    try:
        with fuzz_engine.strict_bounds():
            answer, peak = fuzz_engine.execute(target, path.read_bytes(), True)
    except Exception:  # noqa: BLE001 - shown, that is what a replay is for
        traceback.print_exc()
        return 1
    finally:
        target.close()
    print(f"{answer} ({peak} bytes)")
    return 0


def _keep(folder: Path, prefix: str, data: bytes) -> None:
    (folder / (prefix + hashlib.sha1(data, usedforsecurity=False).hexdigest())).write_bytes(data)


def _told(report: Report) -> str:
    rate = report.executions / max(report.seconds, 1e-9)
    lines = [
        f"{report.target}: {report.executions} executions in {report.seconds:.1f} s ({rate:.0f}/s), {report.kept} inputs kept, "
        f"memory peak {report.memory_peak_bytes / 1024:.0f} KiB, {len(report.crashes)} crashes"
    ]
    lines += [
        f"  {module}: {reached} of {there} lines and branches, {reached / there:.0%}"
        for module, (reached, there) in report.coverage.items()
    ]
    return "\n".join(lines)


def _machine() -> str:
    from report import machine

    return machine()


def _write(page: Path, reports: Sequence[Report], arguments: argparse.Namespace) -> None:
    """Replace the section of this benchmark in the page, or append it."""
    total = sum(report.executions for report in reports)
    crashes = sum(len(report.crashes) for report in reports)
    lines = [
        BEGIN,
        "## Fuzzing of what reads untrusted bytes",
        "",
        f"{total:,} executions, {crashes} crashes, hangs or broken promises, in {sum(r.seconds for r in reports):.0f} s of one core. "
        f"What each target promises:",
        "tests/support/fuzz_targets.py and fuzz_methods.py. Coverage counts lines and branches that the kept inputs reach, of all that the",
        "module has: what only writes, sends or folds is in it, too. Memory is the peak of Python's own allocations for one input.",
        _ENGINES[arguments.engine],
        "",
        f"Measured on {datetime.date.today()} with `python bench/fuzz.py --executions {arguments.executions} --seed {arguments.seed}`",
        f"on {_machine()}.",
        "",
        "| target | executions | per second | inputs kept | memory peak, KiB | crashes | coverage |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in reports:
        reached = ", ".join(f"{module.removeprefix('fleetune.')} {got / there:.0%}" for module, (got, there) in r.coverage.items())
        lines.append(
            f"| {r.target} | {r.executions:,} | {r.executions / r.seconds:,.0f} | {r.kept} | {r.memory_peak_bytes / 1024:.0f} "
            f"| {len(r.crashes)} | {reached} |"
        )
    lines.append(END)
    old = page.read_text(encoding="utf-8")
    before, found, rest = old.partition(BEGIN)
    after = rest.partition(END)[2] if found else "\n"
    page.write_text(before + ("" if found else "\n") + "\n".join(lines) + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
