"""The shape of the repository and the habits that no other tool checks."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPO = Path(__file__).resolve().parents[1]
ROOTS = ("coordinator", "agent", "proto")
SKIPPED_FOLDERS = {".git", "__pycache__", "node_modules", "dist", "build", "wheelhouse", "fleetune-state", "fleetune-demo"}


def files_of_the_repo() -> Iterator[Path]:
    for folder, folders, names in os.walk(REPO):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and not re.search(r"^\.venv|_cache$|^\.hypothesis$", name)]
        yield from (Path(folder, name) for name in names if not Path(folder, name).is_symlink())


def text_of(file: Path) -> str | None:
    content = file.read_bytes()
    if b"\0" in content[:8192]:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def python_sources() -> list[Path]:
    return sorted(file for file in files_of_the_repo() if file.suffix == ".py" and not file.stem.endswith(("_pb2", "_pb2_grpc")))


# ------------------------------------------------------------------------------------------------------------ one namespace


@pytest.mark.parametrize("root", ROOTS)
def test_the_namespace_folders_hold_no_init_file(root: str) -> None:
    assert not (REPO / root / "fleetune" / "__init__.py").exists(), "it would hide the other two roots of the namespace package"


def test_packages_say_that_they_are_typed() -> None:
    packages = ["coordinator/fleetune/coordinator", "agent/fleetune/agent"]
    packages += [f"proto/fleetune/{name}" for name in ("v1", "methods/v1", "wire", "model", "child")]
    assert [package for package in packages if not (REPO / package / "py.typed").exists()] == []


def test_modules_directly_under_the_namespace_need_only_the_standard_library() -> None:
    """Both daemons and all children import them, and the import contracts cannot see into them."""
    files = sorted((REPO / "proto" / "fleetune").glob("*.py"))
    ours = {f"fleetune.{file.stem}" for file in files}
    foreign = [
        f"{file.name}: {name}"
        for file in files
        for name in imports_of(ast.parse(file.read_text()))
        if name.partition(".")[0] not in sys.stdlib_module_names | {"tomllib", "tomli"} and name not in ours
    ]
    assert foreign == []


def imports_of(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from ((f"fleetune.{alias.name}" for alias in node.names) if node.module == "fleetune" else (node.module,))


# ----------------------------------------------------------------------------------------------------------- what runs where

# What a process loads when every one of its modules is imported, against what it must not load. The import contracts say the same of
# the source; this sees what the libraries do.
HEAVY = "torch transformers peft accelerate safetensors sentence_transformers"
NUMERIC = "numpy ml_dtypes pydantic sqlalchemy rich"
AGENT_CHILD = re.compile(r"fleetune\.agent\.(methods(\.|$)|trainer\.(__main__|loop|data|measure)$)")
COORDINATOR_CHILD = re.compile(r"fleetune\.coordinator\.modelhost\.")


def modules_of(package: str, root: str, children: re.Pattern[str]) -> list[str]:
    folder = REPO / root
    files = sorted((folder / package.replace(".", "/")).rglob("*.py"))
    names = [".".join(file.relative_to(folder).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return [name for name in names if not children.match(name) and not name.endswith("__main__")]


@pytest.mark.parametrize(
    ("package", "root", "children", "banned"),
    [
        ("fleetune.agent", "agent", AGENT_CHILD, f"{HEAVY} {NUMERIC} pyarrow"),
        ("fleetune.coordinator", "coordinator", COORDINATOR_CHILD, HEAVY),
        ("fleetune.child", "proto", re.compile("$^"), f"{HEAVY} {NUMERIC} click grpc google.protobuf psutil"),
    ],
)
def test_a_process_loads_only_what_it_may(package: str, root: str, children: re.Pattern[str], banned: str) -> None:
    modules = modules_of(package, root, children)
    script = "import importlib, sys\nfor name in sys.argv[2:]: importlib.import_module(name)\n"
    script += "print(' '.join(name for name in sys.argv[1].split() if name in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script, banned, *modules], capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split() == []


# ------------------------------------------------------------------------------------------------------------ what is unsafe

BANNED_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BANNED_CALLS = {"eval", "exec", "torch.load", "torch.save", "yaml.load", "os.system", "pickle.loads", "numpy.load", "np.load"}
BANNED_KEYWORDS = {("allow_pickle", True), ("trust_remote_code", True), ("weights_only", False), ("shell", True)}


def unsafe_parts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.partition(".")[0] in BANNED_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in BANNED_MODULES:
            yield node.lineno, f"from {node.module}"
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) in BANNED_CALLS:
                yield node.lineno, ast.unparse(node.func)
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in BANNED_KEYWORDS:
                    yield node.lineno, ast.unparse(keyword)


def test_no_source_can_run_what_a_peer_or_a_file_sends() -> None:
    found = [
        f"{file.relative_to(REPO)}:{line}: {what}" for file in python_sources() for line, what in unsafe_parts(ast.parse(file.read_text()))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source", ["import pickle", "from marshal import loads", "torch.load(f)", "f(allow_pickle=True)", "subprocess.run(c, shell=True)"]
)
def test_an_unsafe_source_is_found(source: str) -> None:
    assert list(unsafe_parts(ast.parse(source)))


# ----------------------------------------------------------------------------------------------------------- nobody's machine


def places_of_this_machine() -> list[str]:
    """Strings that would be true on this machine only: home folders, this clone, what pip is configured to read from."""
    places = [str(REPO) + "/"] if len(REPO.parts) > 2 and REPO.parts[1] not in ("opt", "srv", "usr") else []
    settings = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False).stdout
    for value in re.findall(r"(?:index-url|find-links|trusted-host)='([^']*)'", settings.replace("\\n", " ")):
        places += [re.sub(r"^\w+://(?:[^@/]*@)?", "", entry).rstrip("/") for entry in value.split()]
    public = ("pypi.org", "files.pythonhosted.org", "download.pytorch.org")
    return sorted({place for place in places if len(place) > 4 and not place.startswith(public)})


def test_no_file_holds_a_path_or_host_of_somebody_s_machine() -> None:
    home = re.compile(r"(?<![\w.}])/(?:" + "home" + r"/[a-z_][a-z0-9_-]*|" + "Users" + r"/\w+|" + "root" + r")/")
    places = places_of_this_machine()
    found = []
    for file in files_of_the_repo():
        for number, line in enumerate((text_of(file) or "").splitlines(), start=1):
            hits = [*home.findall(line), *(place for place in places if place in line)]
            found += [f"{file.relative_to(REPO)}:{number}: {hit}" for hit in hits]
    assert found == []


# ------------------------------------------------------------------------------------------------------------------- release


def test_the_newest_heading_of_the_changelog_is_the_version_of_the_distribution() -> None:
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    headings = re.findall(r"^## \[?v?(\d+\.\d+\.\d+[^\s\]]*)", (REPO / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[:1] == [version]


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    direct = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    wanted = {name_of(line) for line in direct}
    pinned = {name_of(line) for line in (REPO / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")}
    assert wanted - pinned - {"fleetune"} == set()


def name_of(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]).lower()
