"""Jobs that learn, through the real service: a coordinator and two agents as processes, on tiny models."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fleetune.agent.methods import fedavg_lora as device_side
from fleetune.agent.methods.work import DataFile, DeviceData, Limits, Work
from fleetune.coordinator import jobspec, recipes
from fleetune.coordinator.domain import Blob, Prepared
from fleetune.coordinator.methods.base import RoundFacts
from fleetune.coordinator.methods.fedavg_lora import METHOD
from fleetune.coordinator.modelhost import host
from fleetune.coordinator.rounds import machine
from fleetune.coordinator.rounds.host import encode
from fleetune.coordinator.rounds.job import LiveJob, plan_of
from fleetune.coordinator.rounds.orders import Order
from fleetune.coordinator.rpc import convert
from fleetune.v1 import control_pb2, messages_pb2
from support import tiny_models
from support.fleet import Agent, Fleet, metric, task_of, toml

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

LABELS = list(tiny_models.LABELS)
ONE, TWO = "one", "two"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of both devices; the second has twice as many rows, so that weights matter."""
    folder = tmp_path_factory.mktemp("rows")
    colours = tiny_models.coloured_rows(72)
    write = tiny_models.write_jsonl
    write(folder / "colours-one.jsonl", colours[:24])
    write(folder / "colours-two.jsonl", colours[24:])
    write(folder / "few-one.jsonl", colours[:6])
    write(folder / "few-two.jsonl", colours[6:24])
    write(folder / "lacks-red.jsonl", [row for row in colours if row["label"] != "red"])
    write(folder / "lacks-blue.jsonl", [row for row in colours if row["label"] != "blue"])
    write(folder / "questions.jsonl", tiny_models.question_rows(24))
    with (folder / "colours.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerows([["sentence", "colour"], *([row["text"], row["label"]] for row in colours[:30])])
    columns = {"sentence": [row["text"] for row in colours], "colour": [LABELS.index(str(row["label"])) for row in colours]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "colours.parquet")
    return folder


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Iterator[Fleet]:
    one = {
        "colours": f"{rows}/colours-one.jsonl,{rows}/few-one.jsonl",
        "unequal": f"{rows}/colours-one.jsonl,{rows}/few-two.jsonl",
        "questions": f"{rows}/questions.jsonl,{rows}/questions.jsonl",
        "partial": f"{rows}/lacks-red.jsonl,{rows}/colours-one.jsonl",
        "tables": f"{rows}/colours.csv",
    }
    two = {
        "colours": f"{rows}/colours-two.jsonl,{rows}/few-two.jsonl",
        "questions": f"{rows}/questions.jsonl,{rows}/questions.jsonl",
        "partial": f"{rows}/lacks-blue.jsonl,{rows}/colours-two.jsonl",
        "tables": f"{rows}/colours.parquet",
    }
    agents = {ONE: Agent(one, tags=("lab", "upstairs")), TWO: Agent(two, tags=("lab", "cellar"))}
    with Fleet(tmp_path_factory.mktemp("fleet"), agents) as running:
        yield running


def job(base: Path, **tables: Mapping[str, object]) -> str:
    """A classification job of both devices on colours; `tables` replace or add settings."""
    document: dict[str, dict[str, object]] = {
        "model": {"base": str(base), "allow_hub": False},
        "task": {"kind": "text-classification", "labels": LABELS},
        "lora": {"rank": 4, "alpha": 8, "targets": ["query", "value"]},
        "data": {"name": "colours", "max_length": 32},
        "training": {"steps": 4, "batch_size": 8, "learning_rate": 0.02},
        "rounds": {"count": 3},
        "devices": {"minimum": 2, "wait_s": 60, "keep_warm_s": 600},
    }
    for name, table in tables.items():
        document.setdefault(name, {}).update(table)
    return toml({"name": "tiny", "seed": 3, **document})


@pytest.fixture(scope="module")
def colours_job(fleet: Fleet, bert: Path) -> control_pb2.JobView:
    """Six rounds of classification, whose result several tests look at."""
    return fleet.completed(job(bert, rounds={"count": 6}))


def test_a_classification_job_learns_and_its_devices_measure_it(colours_job: control_pb2.JobView) -> None:
    history = colours_job.history

    assert [entry.round for entry in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1].train_loss < 0.5 * history[0].train_loss
    assert metric(history[-1], "accuracy") > 0.9
    assert all(entry.updates_folded == 2 for entry in history)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks transformers for it
def test_the_devices_measure_the_adapter_that_a_person_gets(fleet: Fleet, colours_job: control_pb2.JobView, bert: Path, rows: Path) -> None:
    """PeftModel loads the folder as it is, head included, and gives the accuracy that the round was committed with."""
    folder = fleet.published(colours_job)
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(bert)
    lines = [*(rows / "few-one.jsonl").read_text().splitlines(), *(rows / "few-two.jsonl").read_text().splitlines()]
    found = [json.loads(line) for line in lines]

    with torch.no_grad():
        batch = tokenizer([row["text"] for row in found], padding=True, return_tensors="pt")
        guesses = model(**batch).logits.argmax(-1).tolist()

    right = sum(LABELS[guess] == row["label"] for guess, row in zip(guesses, found, strict=True))
    assert metric(colours_job.history[-1], "accuracy") == pytest.approx(right / len(found))
    assert colours_job.history[-1].evaluation_rows == len(found)


def test_the_adapter_folder_names_labels_and_no_place_on_a_machine(fleet: Fleet, colours_job: control_pb2.JobView, bert: Path) -> None:
    folder = fleet.published(colours_job)
    texts = {path.name: path.read_text() for path in folder.iterdir() if path.suffix != ".safetensors"}

    assert sorted(texts) == ["README.md", "adapter_config.json", "manifest.json"]
    assert all(f"`{label}`" in texts["README.md"] for label in LABELS)
    assert json.loads(texts["adapter_config.json"])["base_model_name_or_path"] == bert.name
    for name, text in texts.items():
        assert str(bert.parent) not in text and str(fleet.folder) not in text, name


def test_the_global_state_is_the_adapter_file_and_not_a_copy(fleet: Fleet, colours_job: control_pb2.JobView) -> None:
    file = fleet.published(colours_job) / "adapter_model.safetensors"
    digest = colours_job.history[-1].adapter_digest

    # Not by rglob, which does not take it that older rounds are cleared away meanwhile.
    blobs = [Path(folder, digest) for folder, _, names in os.walk(fleet.coordinator_state) if digest in names]

    assert [os.stat(path).st_ino for path in blobs] == [os.stat(file).st_ino]


def test_the_last_three_rounds_the_best_and_the_final_one_are_kept(fleet: Fleet, colours_job: control_pb2.JobView) -> None:
    folder = fleet.job_folder(colours_job.job_id)
    expected = {f"{number:04d}" for number in {4, 5, 6, colours_job.best_round}}

    fleet.poll(lambda: {path.name for path in (folder / "rounds").iterdir()} == expected, f"only {sorted(expected)} to be left")

    assert os.readlink(folder / "final") == "rounds/0006"
    assert os.readlink(folder / "best") == f"rounds/{colours_job.best_round:04d}"


def test_a_manifest_tells_each_device_with_weight_and_digest(fleet: Fleet, colours_job: control_pb2.JobView) -> None:
    manifest = json.loads((fleet.published(colours_job) / "manifest.json").read_text())

    # 4 steps of 8 rows on each device
    assert {device["name"]: device["weight"] for device in manifest["devices"]} == {ONE: 32, TWO: 32}
    assert manifest["state"]["digest"] == colours_job.history[-1].adapter_digest
    assert all(len(device["digest"]) == 64 and device["bytes"] > 0 for device in manifest["devices"])


def test_export_best_gives_the_round_with_the_best_metric(fleet: Fleet, colours_job: control_pb2.JobView, tmp_path: Path) -> None:
    done = fleet.cli("export", colours_job.job_id, str(tmp_path / "best"), "--best", "--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["round"] == colours_job.best_round
    best = fleet.job_folder(colours_job.job_id) / "best" / "adapter_model.safetensors"
    assert (tmp_path / "best" / "adapter_model.safetensors").read_bytes() == best.read_bytes()


def test_a_job_starts_from_the_adapter_of_an_earlier_one(fleet: Fleet, colours_job: control_pb2.JobView, bert: Path) -> None:
    view = fleet.completed(job(bert, lora={"init_adapter": colours_job.job_id}, rounds={"count": 1}))

    assert view.history[0].train_loss < 0.7 * colours_job.history[0].train_loss


def test_the_service_equals_the_same_rounds_in_one_process(fleet: Fleet, bert: Path, rows: Path, tmp_path: Path) -> None:
    """Devices of unequal weight, three rounds, dropout and clipping on: the final tensors agree to float tolerance."""
    text = job(bert, lora={"dropout": 0.1}, training={"steps": 0, "epochs": 1.0, "learning_rate": 0.01}, rounds={"count": 3})

    view = fleet.completed(text)
    service = load_file(fleet.published(view) / "adapter_model.safetensors")
    devices = {fleet.devices()[name].device_id: (name, rows / f"colours-{name}.jsonl") for name in (ONE, TWO)}
    expected = in_one_process(text, view.job_id, bert, devices, tmp_path)

    assert sorted(service) == sorted(expected)
    for name, tensor in expected.items():
        np.testing.assert_allclose(service[name], tensor, rtol=1e-4, atol=1e-5, err_msg=name)


def in_one_process(text: str, job_id: str, base: Path, devices: Mapping[str, tuple[str, Path]], folder: Path) -> dict[str, np.ndarray]:
    """The rounds of a job by the children's own functions and a plain weighted mean, without any service."""
    spec = jobspec.parse(text)
    recipe = recipes.recipe(spec)
    fields = {"base": str(base), "recipe": encode(recipe), "seed": spec.seed, "out_folder": str(folder / "initial")}
    made = host.prepare(fields, lambda *_, **__: None)
    live = LiveJob(job_id, spec, text, "", 0.0, METHOD, recipe, machine.JobMachine(plan_of(job_id, spec, 1.0)))
    initial = Blob(str(made["state_digest"]), int(str(made["size_bytes"])))
    live.machine.prepared = Prepared(initial, str(made["trainables_digest"]), base_digest=str(made["base_digest"]))
    state = folder / "initial" / "adapter_model.safetensors"
    for number in range(1, spec.rounds.count + 1):
        payload = METHOD.assign(spec, RoundFacts(number, list(devices)))
        total: dict[str, np.ndarray] = {}
        weights = 0
        for device_id, (name, train) in devices.items():
            command = machine.SendTask(f"{job_id}/{number}/{device_id}/train", device_id, "train", number, 1, initial, 0.0)
            task = convert.task(Order(command, live, payload[device_id], 0.0), name)
            out = folder / f"{number}-{device_id}"
            work = Work(task, base, state, out, DeviceData(DataFile(train, None), None), Limits(1, "auto", None))
            samples = device_side.train(work, lambda *_, **__: None).report.samples
            for tensor_name, delta in load_file(out).items():
                total[tensor_name] = total.get(tensor_name, 0.0) + samples * delta.astype(np.float64)
            weights += samples
        folded = {name: (tensor + total[name] / weights).astype(np.float32) for name, tensor in load_file(state).items()}
        state = folder / f"state-{number}.safetensors"
        save_file(folded, state, metadata={"format": "pt"})
    return load_file(state)


def test_a_causal_language_model_learns(fleet: Fleet, llama: Path) -> None:
    view = fleet.completed(
        language_job(llama, "causal-lm", ["q_proj", "v_proj"], rounds={"count": 4}, training={"steps": 6, "learning_rate": 0.05})
    )

    assert view.history[-1].train_loss < 0.9 * view.history[0].train_loss
    assert metric(view.history[-1], "loss") < metric(view.history[0], "loss")


def test_a_sequence_to_sequence_model_learns(fleet: Fleet, t5: Path) -> None:
    view = fleet.completed(language_job(t5, "seq2seq-lm", ["q", "v"], rounds={"count": 4}, training={"steps": 6, "learning_rate": 0.05}))

    assert view.history[-1].train_loss < 0.9 * view.history[0].train_loss
    assert metric(view.history[-1], "loss") < metric(view.history[0], "loss")


def language_job(base: Path, kind: str, targets: list[str], **tables: Mapping[str, object]) -> str:
    document: dict[str, dict[str, object]] = {
        "model": {"base": str(base), "allow_hub": False},
        "task": {"kind": kind},
        "lora": {"rank": 8, "alpha": 16, "targets": targets},
        "data": {"name": "questions", "input": "input", "target": "target", "max_length": 64},
        "training": {"batch_size": 8},
        "devices": {"minimum": 2, "wait_s": 60, "keep_warm_s": 600},
    }
    for name, table in tables.items():
        document.setdefault(name, {}).update(table)
    return toml({"name": kind, "seed": 3, **document})


@pytest.mark.parametrize(
    ("method", "training"),
    [
        pytest.param({"server_optimizer": "fedavgm", "server_momentum": 0.5, "proximal_mu": 0.1}, {}, id="fedavgm with FedProx"),
        pytest.param(
            {"server_optimizer": "fedadam", "server_learning_rate": 0.03, "update_dtype": "bfloat16"},
            {"schedule": "linear", "warmup_steps": 2},
            id="fedadam with bfloat16 and a schedule",
        ),
        pytest.param(
            {"server_optimizer": "fedyogi", "server_learning_rate": 0.03, "update_dtype": "float16"},
            {"batch_size": 4, "gradient_accumulation": 2, "gradient_checkpointing": True, "schedule": "cosine"},
            id="fedyogi with accumulation and checkpointing",
        ),
    ],
)
def test_options_of_the_method_and_the_training_learn_too(
    fleet: Fleet, bert: Path, method: dict[str, object], training: dict[str, object]
) -> None:
    view = fleet.completed(job(bert, method=method, training=training, rounds={"count": 4}))

    assert view.history[-1].train_loss < 0.8 * view.history[0].train_loss
    wide = view.history[0].upload_bytes / 2 > 0.8 * os.stat(fleet.published(view) / "adapter_model.safetensors").st_size
    assert wide == ("update_dtype" not in method), "narrow updates are half the size"


def test_a_strong_pull_of_fedprox_keeps_devices_near_the_global_state(fleet: Fleet, colours_job: control_pb2.JobView, bert: Path) -> None:
    held = fleet.completed(job(bert, method={"proximal_mu": 1000.0}, rounds={"count": 2}))

    assert held.history[1].train_loss > colours_job.history[1].train_loss


def test_metrics_of_devices_are_means_weighted_by_their_rows_and_a_job_stops_early(fleet: Fleet, bert: Path) -> None:
    """A rate too small to learn anything: the metric stands still, so patience runs out after the first round and two more."""
    text = job(
        bert,
        training={"learning_rate": 1e-9},
        rounds={"count": 9, "early_stop_patience": 2},
        evaluation={"metric": "accuracy"},
    )

    view = fleet.completed(text)

    assert (view.rounds_committed, view.best_round) == (3, 1)
    assert "stopped early" in view.message
    assert view.history[0].evaluation_rows == 6 + 18
    kinds = {task.device_name for task in view.history[0].tasks if task.kind == messages_pb2.TASK_KIND_EVALUATE}
    assert kinds == {ONE, TWO}


def test_devices_are_drawn_for_each_round_by_the_seed(fleet: Fleet, bert: Path) -> None:
    text = job(bert, devices={"minimum": 1, "per_round": 1}, rounds={"count": 6}, training={"steps": 1}, evaluation={"source": "none"})

    asked = [[task.device_name for task in entry.tasks] for entry in fleet.completed(text).history]

    assert all(len(names) == 1 for names in asked)
    assert {names[0] for names in asked} == {ONE, TWO}


def test_tags_choose_the_devices(fleet: Fleet, bert: Path) -> None:
    text = job(bert, devices={"minimum": 1, "tags": ["lab", "cellar"]}, rounds={"count": 1}, evaluation={"source": "none"})

    view = fleet.completed(text)

    assert [task.device_name for task in view.history[0].tasks] == [TWO]


def test_devices_that_lack_classes_learn_all_of_them_together(fleet: Fleet, bert: Path) -> None:
    view = fleet.completed(job(bert, data={"name": "partial"}, rounds={"count": 6}))

    assert metric(view.history[-1], "accuracy") > 0.9


def test_one_device_has_csv_and_the_other_parquet_with_columns_of_their_own_names(fleet: Fleet, bert: Path) -> None:
    text = job(
        bert,
        data={"name": "tables", "text": "sentence", "label": "colour"},
        training={"steps": 0, "epochs": 1.0},
        rounds={"count": 3},
        evaluation={"source": "none"},
    )

    view = fleet.completed(text)

    assert {name: task_of(view.history[0], name).samples for name in (ONE, TWO)} == {ONE: 30, TWO: 72}
    assert view.history[-1].train_loss < view.history[0].train_loss
