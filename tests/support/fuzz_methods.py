"""What the planning and pruning methods read: structures, pruned updates, what a round of arms learns from; and files of operators."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from fleetune import architectures, importances, sparsity, structures
from fleetune.architectures import Layout
from fleetune.complaints import ComplaintsError
from fleetune.coordinator import archive, planfile
from fleetune.coordinator.domain import (
    Blob,
    Candidate,
    Failure,
    FoldOutcome,
    Prepared,
    PruneSettings,
    Pruning,
    RankSettings,
    RoundEntry,
    TaskEntry,
    Update,
)
from fleetune.coordinator.lora.rules import LoraFold
from fleetune.coordinator.methods import fedara
from fleetune.coordinator.metrics import request
from fleetune.coordinator.rounds import admission, aggregate, layouts, lorafold, lorapairs, machine, ranking, structured
from fleetune.coordinator.rounds.contributions import Contribution
from fleetune.coordinator.rounds.lorapairs import Leeway
from fleetune.coordinator.rpc import convert
from fleetune.coordinator.store import records
from fleetune.coordinator.testbed import chaosfile, testbedfile
from fleetune.coordinator.testbed import records as runs
from fleetune.errors import ConfigError, ModelError, NotFiniteError, WireError
from fleetune.methods.v1 import fedara_pb2
from fleetune.structures import Structure
from fleetune.v1 import messages_pb2
from fleetune.wire import codec
from support import fuzz_targets, tensors
from support.fuzz_engine import Target
from support.fuzz_targets import MIB, OnDisk, outcome_of

_ENCODER: Mapping[str, object] = {
    "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 12,
}  # fmt: skip
_DECODER: Mapping[str, object] = {
    "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 10,
}  # fmt: skip
_T5: Mapping[str, object] = {"model_type": "t5", "d_model": 8, "d_kv": 2, "d_ff": 12, "num_layers": 2, "num_heads": 4}
_CONFIGS = (_ENCODER, _DECODER, _T5)
_LAYOUTS = tuple(architectures.layout(config) for config in _CONFIGS)


def _halved(layout: Layout, share: float) -> Structure:
    """What a device that has cut so much may have left."""
    scores = [[float(unit % 5) for unit in range(group.units)] for group in layout.groups]
    return structures.choose(layout, structures.whole(layout), sparsity.keeps(layout, share), scores)


class Structures(OnDisk):
    """What a model has left, as bytes and as JSON, and the config.json that says what there is: sound for its layout, or refused."""

    name = "structures"
    modules = ("fleetune.structures", "fleetune.architectures", "fleetune.importances")
    share = 16
    words = (
        *(
            b"FTST",
            b"\x01\x00\x00\x00",
            b"\xff\xff\xff\xff",
            b"\x0f",
            b'"kept":',
            b'"groups":',
            b'"version":',
            b'"units":',
            b"0-3",
            b"1,2,3",
        ),
        *(
            b"99999999",
            b"0-99999999",
            b'"model_type":',
            b'"llama"',
            b'"qwen3"',
            b'"t5"',
            b'"distilbert"',
            b'"num_attention_heads":',
            b"1048576",
        ),
        *(
            b"512",
            b"1e9",
            b"-1",
            b"true",
            b"null",
            b"NaN",
            b"[" * 1200,
            b'{"a":' * 700,
            b'"quantization_config":{"bits":4}',
            b"\xff",
            b"9" * 5000,
        ),
    )
    memory_bytes_max = 16 * MIB

    def __init__(self) -> None:
        super().__init__()
        self._before = tuple(_halved(layout, 0.25) for layout in _LAYOUTS)
        self._path = self.folder / "config.json"

    def seeds(self) -> Sequence[bytes]:
        found: list[bytes] = []
        for place, layout in enumerate(_LAYOUTS):
            for share in (0.0, 0.25, 0.5):
                structure = replace(_halved(layout, share), version=int(share * 4))
                found.append(bytes((0, place)) + structures.to_bytes(layout, structure))
                scores = [[share * unit for unit in range(group.units)] for group in layout.groups]
                found.append(bytes((3, place)) + importances.to_text(scores).encode())
                found.append(bytes((1, place)) + json.dumps(structures.to_json(layout, structure)).encode())
        others = [
            {**_DECODER, "model_type": "qwen3", "head_dim": 4},
            {"model_type": "distilbert", "dim": 8, "n_heads": 2, "n_layers": 1, "hidden_dim": 6},
            {**_T5, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 1},
        ]
        return [*found, *(b"\x02\x00" + json.dumps(config).encode() for config in (*_CONFIGS, *others))]

    def run(self, data: bytes) -> str:
        if len(data) < 2:
            return "empty"
        place = data[1] % len(_LAYOUTS)
        readers = (self._bytes, self._json, self._config, self._importance)
        try:
            return readers[data[0] % len(readers)](_LAYOUTS[place], self._before[place], data[2:])
        except (WireError, ModelError) as error:
            return outcome_of(error)

    def _bytes(self, layout: Layout, before: Structure, raw: bytes) -> str:
        structure = structures.from_bytes(layout, raw)
        assert structures.to_bytes(layout, structure) == raw
        return self._sound(layout, before, structure)

    def _json(self, layout: Layout, before: Structure, raw: bytes) -> str:
        try:
            value: object = json.loads(raw)
        except (ValueError, RecursionError):  # what reads such files says so
            return "no JSON"
        return self._sound(layout, before, structures.from_json(layout, value))

    def _sound(self, layout: Layout, before: Structure, structure: Structure) -> str:
        assert structures.complaint(layout, structure) is None
        assert structures.from_bytes(layout, structures.to_bytes(layout, structure)) == structure
        assert structures.from_json(layout, json.loads(json.dumps(structures.to_json(layout, structure)))) == structure
        assert 0.0 <= structures.sparsity(layout, structure) < 1.0
        try:
            structures.check_step(layout, before, structure)
        except WireError as error:
            return f"{layout.model_type}, {self._left(layout, structure)} left, {outcome_of(error)}"
        assert structures.nested(structure, before)
        return f"{layout.model_type}, {self._left(layout, structure)} left, a step"

    def _left(self, layout: Layout, structure: Structure) -> int:
        """Tenths."""
        return round(10 * structures.parameters(layout, structure) / layout.prunable_parameters)

    def _importance(self, layout: Layout, _before: Structure, raw: bytes) -> str:
        scores = importances.from_text(layout, raw.decode("latin-1"))
        assert [len(group) for group in scores] == [group.units for group in layout.groups]
        assert all(0.0 <= value <= importances.SPAN for group in scores for value in group)
        importances.from_text(layout, importances.to_text(scores))
        return f"{layout.model_type}, importance"

    def _config(self, _layout: Layout, _before: Structure, raw: bytes) -> str:
        self._path.write_bytes(raw)
        layout = architectures.of_config(self._path)
        assert layout.prunable_parameters > 0 and 0 <= layout.fingerprint < 2**32
        if structures.size_bytes(layout) <= 4096:
            keeps = sparsity.keeps(layout, 0.5)
            assert all(1 <= keep.units <= group.units for keep, group in zip(keeps, layout.groups, strict=True))
            whole = structures.whole(layout)
            assert structures.from_bytes(layout, structures.to_bytes(layout, whole)) == whole
        return f"{layout.model_type}, {min(len(layout.groups), 6)} groups"


_STEM = "base_model.model.model.layers.0"
_SHAPES: Mapping[str, tuple[int, int]] = {
    "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.o_proj": (8, 8), "mlp.gate_proj": (10, 8), "mlp.down_proj": (8, 10),
}  # fmt: skip
_RANK = 2


class PrunedUpdate(OnDisk):
    """Updates of devices that prune, with pairs of a lower rank and a scale of their own: what is taken folds to the state's own shapes."""

    name = "pruned-update"
    modules = (
        "fleetune.coordinator.rounds.structured",
        "fleetune.coordinator.rounds.lorapairs",
        "fleetune.coordinator.rounds.layouts",
        "fleetune.coordinator.rounds.lorafold",
        "fleetune.coordinator.lora.factors",
        "fleetune.coordinator.lora.means",
        "fleetune.coordinator.lora.rules",
    )
    share = 6
    memory_bytes_max = 8 * MIB

    def __init__(self) -> None:
        super().__init__()
        self._layout = _LAYOUTS[1]
        rng = np.random.default_rng(5)
        self._state: dict[str, tensors.Array] = {"base_model.model.score.weight": rng.normal(size=(2, 8)).astype(np.float32)}
        for module, (rows, columns) in _SHAPES.items():
            self._state[f"{_STEM}.{module}.lora_A.weight"] = rng.normal(size=(_RANK, columns)).astype(np.float32)
            self._state[f"{_STEM}.{module}.lora_B.weight"] = rng.normal(size=(rows, _RANK)).astype(np.float32)
        self._base = tensors.write(self.folder / "state", self._state, {"format": "pt"})
        self._expected = codec.read_table(self._base)
        self._path, self._out = self.folder / "update", self.folder / "folded"
        before = structures.to_bytes(self._layout, replace(_halved(self._layout, 0.25), version=1)).hex()
        self._told = Pruning("device-0001", before, 0.25, 0.5, 0.5, _RANK)
        hexes = (structures.to_bytes(self._layout, replace(_halved(self._layout, share), version=2)).hex() for share in (0.25, 0.5, 0.75))
        self.words = (
            *(word.encode() for word in hexes),
            *(
                b'"fleetune.structure":',
                b'"fleetune.lora_scale":',
                b'"1e300"',
                b'"nan"',
                b'"0x1"',
                b'"-1"',
                b'"1e-320"',
                b'"delta"',
                b'"state"',
            ),
            *(b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f", b"\x00\x00\x80\x7f", b"\x01\x00\x00\x00", b"[1,8]", b"[2,8]", b"[3,8]", b"[0,8]"),
        )

    def seeds(self) -> Sequence[bytes]:
        found: list[bytes] = []
        for share, rank, scale in ((0.25, 2, ""), (0.5, 2, "2.0"), (0.5, 1, "0.5"), (0.375, 1, "1e-30"), (0.5, 2, "1000000")):
            structure = replace(_halved(self._layout, share), version=1 if share == 0.25 else 2)
            arrays: dict[str, tensors.Array] = {}
            for name, whole in self._state.items():
                part = structured.sliced(self._layout, structure, name, whole)
                part = part[:rank] if ".lora_A." in name else part[:, :rank] if ".lora_B." in name else part
                arrays[name] = np.ascontiguousarray(part * 0.01)
            scores = [[float(unit) for unit in range(group.units)] for group in self._layout.groups]
            words = {
                aggregate.KIND_KEY: "delta",
                structured.STRUCTURE_KEY: structures.to_bytes(self._layout, structure).hex(),
                structured.IMPORTANCE_KEY: importances.to_text(scores),
            }
            if scale:
                words[lorapairs.SCALE_KEY] = scale
            found.append(tensors.write(self._path, arrays, words).read_bytes())
        return found

    def run(self, data: bytes) -> str:
        self._path.write_bytes(data)
        places = (self._path, self._path)
        try:
            facts = admission.inspected(places, self._expected, Leeway(_RANK, self._layout))
            reached = layouts.reached(self._layout, self._told, facts.structure)
        except WireError as error:
            return outcome_of(error)
        assert self._told.sparsity_before <= reached <= self._told.sparsity_after, reached
        if facts.kind != "delta":  # this method takes no others
            return f"a {facts.kind}"
        contributions = (Contribution("device-0001", self._path, 3), Contribution("device-0002", self._path, 1))
        plan = aggregate.FoldPlan(self._base, contributions, self._out, layout=self._layout)
        try:
            folded = lorafold.fold(plan, LoraFold("exact", _RANK, 2.0, 1, narrower=True))
        except NotFiniteError as error:
            assert not self._out.exists()
            return outcome_of(error)
        table = codec.read_table(self._out)
        assert {(s.name, s.shape, s.dtype) for s in table.specs} == {(s.name, s.shape, s.dtype) for s in self._expected.specs}
        assert np.isfinite(np.frombuffer(self._out.read_bytes()[table.data_start :], np.float32)).all()
        assert math.isfinite(folded.update_norm) and all(map(math.isfinite, folded.metrics.values()))
        self._out.unlink()
        ranks = {spec.shape[0] for spec in codec.read_table(self._path).specs if ".lora_A." in spec.name}
        distance = math.floor(math.log10(max(folded.metrics.get(lorafold.AGGREGATION_ERROR, 0.0), 1e-20)))
        return f"folded {len(facts.names)} tensors of {facts.dtype} at {reached:.2f}, ranks {sorted(ranks)}, error 1e{distance}"


_SETTINGS = (
    PruneSettings(),
    PruneSettings(target=0.9, step_max=0.5, recovery_rounds=0, rank_min=1, rank_max=64, rank=64),
    PruneSettings(choice="fixed", pace=1.0, rank=4, recovery_rounds=9),
    PruneSettings(discount=0.5, exploration=1.0, deadline_s=10.0, rank_min=8),
)
_PLAN = machine.JobPlan("job-1", 5, 1, 0, 0.5, 0.0, 0.0, 3, "none", 1, "loss", 0, 0.0, 15.0)
_DEVICES = (Candidate("device-0001", "kitchen-pi"), Candidate("device-0002", "attic"))
_TOLD = struct.Struct("<B12d")
_NAMES = ("loss_before", "loss_after", "update_norm", "step_s", "steps", "loss")
_BYTES = ("peak_bytes", "room_bytes", "prunable_bytes", "rank_bytes")


class Arms(Target):
    """Rounds of a job that prunes, whatever its devices say of themselves: the next arms stay within the job's bounds, and the job reads
    back as it was written and goes on alike.

    The bytes are a program: which settings, then for each device of each round which figures it tells, and these.
    """

    name = "arms"
    modules = ("fleetune.coordinator.rounds.arms", "fleetune.coordinator.rounds.bandit", "fleetune.sparsity")
    share = 2
    words = (
        *(struct.pack("<d", number) for number in (math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, -0.0, 0.5, 60.0, 1e18)),
        *(bytes((flags,)) for flags in (0, 0x3F, 0x7F, 0xFF)),
    )
    memory_bytes_max = 8 * MIB

    def seeds(self) -> Sequence[bytes]:
        usual = _TOLD.pack(0x7F, 2.0, 1.5, 0.3, 0.2, 60.0, 1.6, 30.0, 2.0, 3e8, 9e8, 1e8, 1e6)
        slow = _TOLD.pack(0x7F, 2.0, 1.9, 3.0, 2.0, 60.0, 1.9, 300.0, 60.0, 9e8, 1e9, 1e8, 1e7)
        silent = _TOLD.pack(0, *([0.0] * 12))
        failed = _TOLD.pack(0x80, *([0.0] * 12))
        short = _TOLD.pack(0xC0, *([0.0] * 12))
        strange = [_TOLD.pack(0x7F, *([number] * 12)) for number in (math.nan, math.inf, -1.0, 1e308, 5e-324)]
        programs = (
            usual * 10,
            (usual + slow) * 5,
            (slow + silent) * 3,
            (usual + failed) * 4,
            (usual + short) * 5,
            failed * 2,
            *(one * 4 for one in strange),
        )
        return [bytes((4 * (place % 5) + place % 4,)) + program for place, program in enumerate(programs)] + [b"\xff{}"]

    def run(self, data: bytes) -> str:
        if data[:1] == b"\xff":  # no program, but a job's record
            return self._stored(data[1:])
        settings = _SETTINGS[data[0] % len(_SETTINGS) if data else 0]
        job = machine.JobMachine(replace(_PLAN, pruning=settings))
        job.handle(machine.Started(), 1.0)
        job.handle(machine.PreparedEvent(Prepared(Blob("0" * 64, 8), "0" * 64)), 1.0)
        told = _TOLD.iter_unpack(data[1 : 1 + (len(data) - 1) // _TOLD.size * _TOLD.size] if data else b"")
        story: list[str] = []
        while job.status == "waiting":
            restarted = data[:1] and job.committed == data[0] // len(_SETTINGS) % _PLAN.rounds
            before = records.dump_machine(job) if restarted else ""
            job.handle(machine.Offered(_DEVICES), 2.0)
            if restarted:
                again = records.load_machine(before)
                again.handle(machine.Offered(_DEVICES), 2.0)
                text = records.dump_machine(job)
                assert text == records.dump_machine(again), "a job that was read back goes on otherwise"
                assert records.dump_machine(records.load_machine(text)) == text
            if job.round is None or not self._a_round(job, settings, told):
                break
            story.append(self._arms_of(job))
        return f"{settings.choice} {settings.target} {job.status} {job.committed} {' '.join(story[-1:])}"

    def _a_round(self, job: machine.JobMachine, settings: PruneSettings, told: Iterator[tuple[float, ...]]) -> bool:
        """False where the program is over."""
        entry = job.round
        assert entry is not None
        for pruning in entry.prunings:
            assert 0.0 <= pruning.sparsity_before <= pruning.sparsity_after <= max(settings.target, pruning.sparsity_before) < 1.0, pruning
            assert 0.0 <= pruning.pace <= 1.0 and 1 <= pruning.rank <= max(settings.rank_max, settings.rank), pruning
            task = next(task for task in entry.tasks.values() if task.device_id == pruning.device_id)
            line = next(told, None)
            if line is None:
                return False
            job.handle(self._answer(task.task_id, pruning, int(line[0]), line[1:]), 3.0)
            if job.round is None or job.round.phase != "training":
                break
        if job.round is not None and job.round.phase == "folding":
            job.handle(machine.Folded(entry.number, FoldOutcome(Blob(f"{entry.number:064d}", 8)), _DEVICES), 4.0)
        return True

    def _answer(self, task_id: str, pruning: Pruning, flags: int, values: Sequence[float]) -> machine.Event:
        if flags & 0x80:
            return machine.TaskFailed(task_id, Failure("out_of_memory" if flags & 0x40 else "crash", "train", "it fell"))
        metrics = [messages_pb2.Metric(name=name, value=values[place]) for place, name in enumerate(_NAMES) if flags >> place & 1]
        metrics += [messages_pb2.Metric(name=name, value=value) for name, value in zip(_BYTES, values[8:], strict=True) if flags & 0x20]
        # What the coordinator measures itself is a finite time.
        ready_s, sent_s = (min(abs(value), 1e6) if math.isfinite(value) else 0.0 for value in values[6:8])
        reached = pruning.sparsity_after if flags & 0x40 else pruning.sparsity_before
        update = Update(
            Blob("1" * 64, 8), 1, convert.metrics(metrics), kind="delta", ready_s=ready_s, sent_s=sent_s, structure="00", sparsity=reached
        )
        return machine.UpdateArrived(task_id, update)

    def _arms_of(self, job: machine.JobMachine) -> str:
        return ",".join(f"{spine.rank}/{len(spine.bandit.leaves)}" for _, spine in sorted(job.spines.items()))

    def _stored(self, raw: bytes) -> str:
        """A job's record, as a damaged database may hold it."""
        try:
            job = records.load_machine(raw.decode("utf-8", "replace"))
        except ValidationError:
            return "no record"
        return f"a record, {job.status}"


_DIGITS = re.compile(r"\d+|'[^']*'")
_RANKS = {"bert.layer.0.query": 4, "bert.layer.0.value": 2, "bert.layer.1.query": 1}


def _report(scores: Mapping[str, Sequence[float]]) -> bytes:
    told = fedara_pb2.FedaraReport(steps=3, mean_loss=0.5)
    for module, values in sorted(scores.items()):
        told.scores.add(module=module, float16=struct.pack(f"<{len(values)}e", *values))
    return told.SerializeToString()


class TripletScores(Target):
    """What a device says its adapter's triplets matter, as two devices' reports one after the other: refused, or as many triplets stay as
    the round's budget has, the same ones whenever it is asked."""

    name = "triplet-scores"
    modules = (
        "fleetune.coordinator.methods.fedara",
        "fleetune.coordinator.rounds.ranking",
        "fleetune.coordinator.rounds.arbitration",
    )
    share = 6
    words = (
        *(module.encode() for module in _RANKS),
        *(b"\x00\x7c", b"\x00\xfc", b"\x00\x7e", b"\xff\x7b", b"\x01\x00", b"\x00\x80", b"\x0a", b"\x12", b"\xff", b"\n"),
    )

    def seeds(self) -> Sequence[bytes]:
        usual = _report({module: [1.0 / (1 + place) for place in range(rank)] for module, rank in _RANKS.items()})
        other = _report({module: [0.5 * place for place in range(rank)] for module, rank in _RANKS.items()})
        even = _report({module: [1.0] * rank for module, rank in _RANKS.items()})
        none = _report({module: [0.0] * rank for module, rank in _RANKS.items()})
        strange = _report({module: [math.nan] * rank for module, rank in _RANKS.items()})
        pairs = ((usual, other), (even, usual), (none, other), (other, even), (strange, usual), (none, none), (usual, usual))
        return [
            bytes((9 * place + variant, len(first))) + first + second for place, (first, second) in enumerate(pairs) for variant in (0, 4)
        ]

    def run(self, data: bytes) -> str:
        if len(data) < 2:
            return "empty"
        split = 2 + data[1]
        told: list[dict[str, bytes]] = []
        for raw in (data[2:split], data[split:]):
            try:
                scores = fedara.scores(raw)
            except WireError as error:
                return outcome_of(error)
            if wrong := ranking.objection(_RANKS, scores):
                assert len(wrong) <= 400, len(wrong)
                return f"refused, {_DIGITS.sub('#', wrong)[:80]}"
            told.append(scores)
        settings = RankSettings(end=(0.25, 0.5, 0.01, 1.0)[data[0] % 4], arbitration="vote" if data[0] & 4 else "score", first=7)
        entry = RoundEntry(1 + data[0] // 8 % 5, "folding", 1.0, ranks=dict(_RANKS))
        for number, scores in enumerate(told):
            update = Update(Blob("1" * 64, 8), 1 + number, scores=ranking.packed(scores))
            task = TaskEntry(f"t{number}", f"device-{number}", f"d{number}", "train", 1, status="done", update=update)
            entry.tasks[task.task_id] = task
        alive = ranking.decided(settings, 5, entry)
        assert alive == ranking.decided(settings, 5, entry)
        assert {module: len(mask) for module, mask in alive.items()} == _RANKS
        left = sum(ranking.left(alive).values())
        assert 1 <= left <= 7 and all(set(mask) <= {"0", "1"} for mask in alive.values())
        return f"{settings.arbitration}, {' '.join(alive.values())}"


_TESTBED = testbedfile.parse(testbedfile.DEFAULT)
_CHAOS = (
    b'seed = 3\n[[fault]]\nkind = "kill"\ntarget = "any"\nat_s = 1.5\n'
    b'[[fault]]\nkind = "throttle"\ntarget = "pi4"\nevery_s = 9\nuntil_s = 60\nto_mbit = 0.5\n'
)
_FLEET: Mapping[str, object] = {
    "resource": {"total": 1e7, "kind": "bit/s"},
    "blocks": [{"name": "a", "payload_bits": 1000, "rounds_since_trained": 1}, {"name": "b", "payload_bits": 0}],
    "devices": [
        {"name": "x", "ready_seconds": [1, 2.5], "fits": [True, False], "bits_per_unit": 1.0, "max_share": None},
        {"name": "y", "ready_seconds": [0, 1e3], "fits": [True, True], "snr_hz": 1e5},
    ],
}
_RUN: Sequence[Mapping[str, object]] = (
    {
        "what": "began",
        "at_unix_s": 10.0,
        "backend": "processes",
        "spec": {"name": "t"},
        "chaos": [],
        "machine": {},
        "job_id": "j",
        "job": "",
    },
    {
        "what": "sampled",
        "at_unix_s": 11.0,
        "members": {"pi4-1": {"cpu_s": 1.0, "memory_bytes": 9}},
        "lives": {"pi4-1": "up"},
        "round_number": 1,
    },
    {"what": "acted", "at_unix_s": 12.0, "member": "pi4-1", "act": "kill", "text": "killed"},
    {"what": "ended", "at_unix_s": 13.0, "status": "completed", "report": {"submitted_unix_s": 9.5, "ended_unix_s": 12.5}, "notes": ["x"]},
    {"what": "checked", "at_unix_s": 14.0, "history": []},
)


class OperatorFiles(Target):
    """Files that an operator hands in: a planning problem, a testbed, its faults, the record of a run. Whole, or complaints that can be
    printed."""

    name = "operator-files"
    modules = (
        "fleetune.coordinator.planfile",
        "fleetune.coordinator.testbed.tables",
        "fleetune.coordinator.testbed.testbedfile",
        "fleetune.coordinator.testbed.chaosfile",
        "fleetune.coordinator.testbed.records",
    )
    share = 6
    memory_bytes_max = 16 * MIB
    words = (
        *(
            b"[[device]]",
            b"[[fault]]",
            b"kind",
            b"count",
            b"cpus",
            b"1" + b"0" * 400,
            b"9" * 5000,
            b"nan",
            b"inf",
            b"-1",
            b"1e400",
            b'"pi4"',
        ),
        *(
            b'"ready_seconds":',
            b'"fits":',
            b'"snr_hz":',
            b"null",
            b"true",
            b'"what":',
            b'"began"',
            b'"sampled"',
            b'"acted"',
            b'"at_unix_s":',
        ),
        *(b"[" * 1500, b'{"a":' * 700, b"\n", b"\xff", b"\x00", b"=", b",", b"{", b"}", b"]"),
    )

    def seeds(self) -> Sequence[bytes]:
        run = b"\n".join(json.dumps(fact).encode() for fact in _RUN)
        testbed = testbedfile.DEFAULT.encode()
        return [b"\x00" + json.dumps(_FLEET).encode(), b"\x01" + testbed, b"\x02" + _CHAOS, b"\x03" + run + b"\n", b"\x03" + run[:-9]]

    def run(self, data: bytes) -> str:
        if not data:
            return "empty"
        text = data[1:].decode("utf-8", "replace")
        try:
            match data[0] % 4:
                case 0:
                    fleet = planfile.parse(data[1:])
                    assert np.isfinite(fleet.ready_s).all() and fleet.ready_s.shape == (len(fleet.devices), len(fleet.blocks))
                    return f"a fleet of {min(len(fleet.devices), 5)}"
                case 1:
                    spec = testbedfile.parse(text)
                    assert len(set(spec.names)) == len(spec.names) <= testbedfile.DEVICES_MAX
                    return f"a testbed of {min(len(spec.names), 9)}"
                case 2:
                    return f"{min(len(chaosfile.parse(text, _TESTBED).faults), 5)} faults"
                case _:
                    run = runs.parse(data[1:], "run.jsonl")
                    assert math.isfinite(run.origin_unix_s) and math.isfinite(run.end_unix_s)
                    return f"a run, {len(run.notes)} notes, {run.ended is not None}"
        except ConfigError as error:
            if isinstance(error, ComplaintsError):
                fuzz_targets.check_complaints(error)
            return outcome_of(error)


class Archives(Target):
    """The list of a backup's files: whole, with no name that a backup cannot have, or refused in words."""

    name = "archives"
    modules = ("fleetune.coordinator.archive",)
    share = 8
    memory_bytes_max = 16 * MIB
    words = (
        *(
            b'"format":',
            b'"files":',
            b'"name":',
            b'"digest":',
            b'"size_bytes":',
            b"blobs/",
            b"tls/",
            b"../",
            b"coordinator.sqlite",
            b"0" * 64,
        ),
        *(b"-1", b"1e400", b"9" * 5000, b"NaN", b"true", b"null", b"[" * 1200, b'{"a":' * 700, b'"\\ud800"', b"Infinity"),
    )

    def seeds(self) -> Sequence[bytes]:
        files = (archive.File(archive.DATABASE, "1" * 64, 4096), archive.File(f"{archive.BLOBS}{'2' * 64}", "2" * 64, 7))
        whole = archive.Manifest(1.5e9, "0.1.0", 7, 3, files)
        tls = tuple(archive.File(name, "3" * 64, 10) for name in sorted(archive.TLS_NAMES))
        return [
            archive.dump(whole),
            archive.dump(replace(whole, files=(*files, *tls), made_unix_s=1.0)),
            archive.dump(replace(whole, files=())),
        ]

    def run(self, data: bytes) -> str:
        try:
            found = archive.load(data, Path("monday.tar"))
        except ConfigError as error:
            return self._told(str(error))
        assert archive.load(archive.dump(found), Path("again.tar")) == found
        for file in found.files:
            assert ".." not in file.name.split("/") and not file.name.startswith("/") and 0 <= file.size_bytes <= archive.FILE_BYTES_MAX
        assert found.size_bytes() >= 0
        return f"{min(len(found.files), 6)} files, schema {min(found.schema_version, 9)}"

    def _told(self, said: str) -> str:
        assert len(said) <= 1000, len(said)
        # What it quotes tells apart which of its fields is wrong.
        return f"refused, {len(said)}, {outcome_of(ConfigError(said))}"


class MetricsRequests(Target):
    """The head of a request for metrics: its parts are plain and bounded, or it is none."""

    name = "metrics-requests"
    modules = ("fleetune.coordinator.metrics.request",)
    share = 12
    memory_bytes_max = 2 * MIB
    words = (
        *(
            b"GET ",
            b"HEAD ",
            b"/metrics",
            b" HTTP/1.1",
            b" HTTP/2",
            b"\r\n",
            b"\n",
            b"Host: ",
            b"Authorization: Bearer ",
            b"Accept-Encoding: ",
        ),
        *(b"gzip;q=0", b"gzip", b":9464", b"[::1]:1", b"\x00", b"\xff", b"a: b\r\n" * 101, b" " * 2048, b":", b"?", b";q=0.0"),
    )

    def seeds(self) -> Sequence[bytes]:
        return [
            b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:9464\r\nAccept: text/plain\r\nAccept-Encoding: gzip, deflate\r\n\r\n",
            b"HEAD /metrics?x=1 HTTP/1.0\r\nAuthorization: Bearer secret\r\n\r\n",
            b"POST /metrics HTTP/1.1\r\nHost: [::1]\r\n\r\n",
            b"GET / HTTP/1.1\r\nAccept-Encoding: gzip;q=0\r\n\r\n",
        ]

    def run(self, data: bytes) -> str:
        found = request.parse(data[: request.HEAD_BYTES_MAX])
        if found is None:
            return "none"
        assert found.method.isupper() and len(found.path) <= 2048 and len(found.headers) <= request.HEADERS_MAX
        assert not any(c in value for value in found.headers.values() for c in "\r\n\x00")
        objection = found.objection
        return f"{objection} gzip={found.takes_gzip} host={bool(found.host)} bearer={bool(found.bearer)} {min(len(found.headers), 4)}"


KINDS: tuple[type[Target], ...] = (Structures, PrunedUpdate, Arms, TripletScores, OperatorFiles, Archives, MetricsRequests)
