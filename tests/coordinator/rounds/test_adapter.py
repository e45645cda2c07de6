"""The folder of a committed round: complete, linked, and silent about the coordinator's machine."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fleetune.coordinator import jobspec
from fleetune.coordinator.domain import Blob, Prepared, RoundEntry, TaskEntry, Update
from fleetune.coordinator.rounds import adapter
from fleetune.coordinator.store.blobs import BlobStore

SECRET = "/opt/hidden-place/minilm"

TOML = f"""
name = "intents"
[model]
base = "{SECRET}"
[task]
kind = "text-classification"
labels = ["lights_on", "lights_off"]
[lora]
targets = ["query", "value"]
init_adapter = "{SECRET}/adapter"
[data]
name = "intents"
text = "text"
label = "label"
[evaluation]
source = "heldout"
heldout = "{SECRET}/rows.jsonl"
"""


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "state")


@pytest.fixture
def found(store: BlobStore) -> adapter.Adapter:
    digest = store.put_bytes(b"tensors")
    config = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "minilm"})
    prepared = Prepared(Blob("0" * 64, 7), "t" * 64, "b" * 64, base_name="minilm", base_folder=SECRET, adapter_config=config)
    entry = RoundEntry(7, "committed", 1.0, start_state=Blob("1" * 64, 7), state=Blob(digest, 7))
    entry.metrics, entry.evaluation_rows = {"accuracy": 0.75}, 40
    for name in ("b", "a"):
        update = Update(Blob(name * 64, 5), 3, {"loss": 0.5})
        entry.tasks[name] = TaskEntry(name, f"id-{name}", name, "train", 1, "done", update=update)
    entry.tasks["c"] = TaskEntry("c", "id-c", "c", "train", 1, "missed")
    return adapter.Adapter("intents-1234", jobspec.parse(TOML), prepared, entry)


def test_the_folder_holds_the_four_files_and_the_state_is_the_blob_itself(tmp_path: Path, store: BlobStore, found: adapter.Adapter) -> None:
    folder = adapter.write(tmp_path / "jobs", store, found)
    assert folder == tmp_path / "jobs" / "intents-1234" / "rounds" / "0007"
    assert {path.name for path in folder.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    assert found.entry.state is not None
    assert (folder / adapter.STATE_FILE).samefile(store.path(found.entry.state.digest))
    assert adapter.is_whole(tmp_path / "jobs", found)


def test_nothing_tells_a_path_of_the_coordinators_machine(found: adapter.Adapter) -> None:
    for name, text in adapter.texts(found).items():
        assert "/opt" not in text, name
        assert "hidden-place" not in text, name


def test_the_manifest_names_who_contributed_what(found: adapter.Adapter) -> None:
    manifest = json.loads(adapter.manifest(found))
    told = [(d["name"], d["weight"], d["bytes"], d["digest"]) for d in manifest["devices"]]
    assert told == [("a", 3, 5, "a" * 64), ("b", 3, 5, "b" * 64)]
    assert manifest["state"]["digest"] == found.entry.state.digest  # type: ignore[union-attr]
    assert manifest["base"] == {"hub_id": "", "revision": "", "name": "minilm", "digest": "b" * 64}
    assert manifest["round"] == 7


def test_the_card_has_the_labels_in_order_and_how_to_load_it(found: adapter.Adapter) -> None:
    text = adapter.readme(found)
    assert text.index("0. `lights_on`") < text.index("1. `lights_off`")
    assert "AutoModelForSequenceClassification" in text
    assert "num_labels=2" in text
    assert "accuracy: 0.7500 on 40 rows" in text
    assert "on 2 devices" in text


def test_a_job_without_a_model_has_no_adapter_config(tmp_path: Path, store: BlobStore, found: adapter.Adapter) -> None:
    spec = jobspec.parse('name = "link"\n[method]\nname = "echo"\n')
    bare = replace(found, spec=spec, prepared=Prepared(Blob("0" * 64, 7), "t" * 64))
    folder = adapter.write(tmp_path / "jobs", store, bare)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "adapter_model.safetensors", "manifest.json"]
    assert "PeftModel" not in (folder / "README.md").read_text()


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path: Path, store: BlobStore, found: adapter.Adapter) -> None:
    folder = adapter.write(tmp_path / "jobs", store, found)
    (folder / "README.md").write_text("mine")
    adapter.write(tmp_path / "jobs", store, found)
    assert (folder / "README.md").read_text() == "mine"
    assert not adapter.is_whole(tmp_path / "jobs", found)


def test_a_missing_blob_leaves_no_folder(tmp_path: Path, store: BlobStore, found: adapter.Adapter) -> None:
    gone = replace(found, entry=replace(found.entry, state=Blob("f" * 64, 7)))
    with pytest.raises(FileNotFoundError):
        adapter.write(tmp_path / "jobs", store, gone)
    assert list((tmp_path / "jobs" / "intents-1234" / "rounds").iterdir()) == []
    assert not adapter.is_whole(tmp_path / "jobs", gone)


def test_best_and_final_lead_to_rounds_and_can_be_moved(tmp_path: Path, store: BlobStore, found: adapter.Adapter) -> None:
    jobs = tmp_path / "jobs"
    folder = adapter.write(jobs, store, found)
    for number in (3, 7):
        adapter.point(jobs, "intents-1234", "best", number)
    assert (jobs / "intents-1234" / "best").resolve() == folder.resolve()
    # A relative link: the state_dir may be moved.
    assert not (jobs / "intents-1234" / "best").readlink().is_absolute()
    assert sorted(path.name for path in (jobs / "intents-1234").iterdir()) == ["best", "rounds"]


def test_a_dropped_folder_leaves_its_blob(tmp_path: Path, store: BlobStore, found: adapter.Adapter) -> None:
    jobs = tmp_path / "jobs"
    adapter.write(jobs, store, found)
    assert adapter.rounds(jobs, "intents-1234") == [7]
    adapter.drop(jobs, "intents-1234", 7)
    adapter.drop(jobs, "intents-1234", 7)
    assert adapter.rounds(jobs, "intents-1234") == []
    assert adapter.rounds(jobs, "never") == []
    assert found.entry.state is not None
    assert store.has(found.entry.state.digest)


def test_a_drop_that_is_cut_short_leaves_no_half_folder(
    tmp_path: Path, store: BlobStore, found: adapter.Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = tmp_path / "jobs"
    adapter.write(jobs, store, found)

    def killed(path: Path) -> None:
        (path / adapter.STATE_FILE).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            adapter.drop(jobs, "intents-1234", 7)
    assert adapter.rounds(jobs, "intents-1234") == []


def test_a_start_clears_away_what_a_crash_has_left_and_nothing_else(tmp_path: Path, store: BlobStore, found: adapter.Adapter) -> None:
    jobs = tmp_path / "jobs"
    folder = adapter.write(jobs, store, found)
    adapter.point(jobs, "intents-1234", "best", 7)
    (folder.parent / ".0008.12ab34cd").mkdir()
    (folder.parent / ".0008.12ab34cd" / adapter.STATE_FILE).write_bytes(b"linked")
    (jobs / "intents-1234" / ".final.12ab34cd").symlink_to("rounds/0008")
    (jobs / "intents-1234" / ".notes").write_text("somebody's own")
    adapter.tidy(jobs, "intents-1234")
    adapter.tidy(jobs, "never")
    assert [path.name for path in folder.parent.iterdir()] == ["0007"]
    assert sorted(path.name for path in (jobs / "intents-1234").iterdir()) == [".notes", "best", "rounds"]
    assert adapter.is_whole(jobs, found)
