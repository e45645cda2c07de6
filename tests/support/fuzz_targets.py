"""What reads untrusted bytes, each with valid inputs to begin from and the promises that must hold for any bytes at all.

A target's `run` catches the error classes that its reader declares and nothing else. Its answer names the outcome, without the numbers
and names of the input, so that a fuzzer can tell a new kind of outcome from one more of the same.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from google.protobuf.message import DecodeError, Message
from safetensors import SafetensorError, deserialize

from fleetune.agent import config as agent_config
from fleetune.agent import convert as agent_convert
from fleetune.child import answers, entry
from fleetune.complaints import ComplaintsError
from fleetune.coordinator import config as coordinator_config
from fleetune.coordinator import jobspec, loraranks, overrides, principal
from fleetune.coordinator.domain import Blob, Candidate, DepthBlock, PlanRequest, PlanSettings, Prepared
from fleetune.coordinator.registry import Registry
from fleetune.coordinator.rounds import aggregate, machine, planning
from fleetune.coordinator.rpc import convert
from fleetune.coordinator.rpc.fleet import FleetService
from fleetune.coordinator.store import records
from fleetune.errors import ConfigError, DataError, WireError
from fleetune.methods.v1 import deft_pb2, fedspine_pb2
from fleetune.v1 import blob_pb2, fleet_pb2, messages_pb2
from fleetune.wire import basefiles, checksums, chunks, codec, digests, frames, identity, joinline
from support import tensors
from support.fuzz_engine import Target

MIB = 1 << 20
FOLDERS = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "deploy" / "config" / "jobs"
INTEGER_MAX = 2**63 - 1

_CHANGING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[0-9a-f]{12,}|-?\d+|\[[^\]]*\]")


def outcome_of(error: Exception) -> str:
    """The error's class and message without what came from the input."""
    return f"{type(error).__name__}: {_CHANGING.sub('#', str(error))[:160]}"


class OnDisk(Target):
    """Reads files: they lie in a folder of its own, in memory where the system has such a place."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{os.getpid()}-", dir=FOLDERS))

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def left(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


# --- tensor files ---------------------------------------------------------------------------------------------------------------


_TENSOR_WORDS = (
    *(f'"{dtype}"'.encode() for dtype in codec.ITEM_BYTES),
    *(b'"dtype":', b'"shape":', b'"data_offsets":', b'"__metadata__":', b"[0,0]", b"[0,4]", b"[]", b"{}", b"null", b"true", b"NaN", b"1e9"),
    *(b"-1", b"18446744073709551616", b"[100000000000000000,100000000000000000,0]", b'"\\ud800"', b'"fleetune.update":"delta"', b'"state"'),
    *(b"[" * 300, b'{"a":' * 200, b"\xff\xfe", b" " * 8, b"\x00\x00\x10\x00\x00\x00\x00\x00"),
)


def _file_of(header: Mapping[str, object], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


class TensorHeader(Target):
    """A header that is taken means the same to the safetensors library and is written back with the same meaning."""

    name = "tensor-header"
    modules = ("fleetune.wire.codec",)
    share = 40
    words = _TENSOR_WORDS
    memory_bytes_max = 16 * MIB

    def seeds(self) -> Sequence[bytes]:
        two = {"b": _entry("F32", (2, 2), 0, 16), "a": _entry("BF16", (3,), 16, 22), "__metadata__": {"format": "pt"}}
        dtypes = {
            dtype: _entry(dtype, (1,), begin, begin + width)
            for dtype, begin, width in (
                (d, sum(list(codec.ITEM_BYTES.values())[:i]), w) for i, (d, w) in enumerate(codec.ITEM_BYTES.items())
            )
        }
        return [
            _file_of(two, bytes(22)),
            _file_of(dtypes, bytes(sum(codec.ITEM_BYTES.values()))),
            _file_of({}, b""),
            _file_of({"scalar": _entry("I64", (), 0, 8), "empty": _entry("U8", (0, 5), 8, 8)}, bytes(8)),
            codec.build_header(codec.pack([("x", "F16", (4,)), ("y.lora_A", "F16", (2, 1))]), {"fleetune.update": "delta"}) + bytes(12),
        ]

    def run(self, data: bytes) -> str:
        try:
            table = codec.parse_header(data, len(data))
        except WireError as error:
            return outcome_of(error)
        try:
            theirs = dict(deserialize(data))  # type: ignore[no-untyped-call]  # a compiled module
        except SafetensorError as error:
            raise AssertionError(f"the library refuses what we take: {error}") from error
        assert {name: (tuple(cast("Any", t)["shape"]), cast("Any", t)["dtype"]) for name, t in theirs.items()} == {
            spec.name: (spec.shape, spec.dtype) for spec in table.specs
        }
        written = codec.build_header(table.specs, table.metadata)
        again = codec.parse_header(written, len(written) + sum(spec.size_bytes for spec in table.specs))
        assert (again.specs, dict(again.metadata)) == (table.specs, dict(table.metadata))
        assert len(codec.trainables_digest(table)) == 64
        return f"{len(table.specs)} tensors, {len(table.metadata)} words, {sorted({spec.dtype for spec in table.specs})}"


class UpdateFile(OnDisk):
    """An update that is taken holds finite numbers in tensors of the state's names and shapes, and its norm is what numpy finds."""

    name = "update-file"
    modules = (
        "fleetune.coordinator.rounds.aggregate",
        "fleetune.coordinator.rounds.contributions",
        "fleetune.coordinator.rounds.slabs",
        "fleetune.wire.codec",
    )
    share = 20
    words = (
        *_TENSOR_WORDS,
        b"\x00\x00\xc0\x7f",
        b"\x00\x00\x80\x7f",
        b"\x00\x7c",
        b"\xff\xff\x7f\x7f",
        b"\x01\x00\x00\x00",
        b"fleetune.update",
    )
    memory_bytes_max = 4 * MIB

    def __init__(self) -> None:
        super().__init__()
        state = {"a.lora_A": np.zeros((2, 3), np.float32), "b.lora_B": np.zeros((4,), np.float32), "c": np.zeros((), np.float32)}
        self._arrays = state
        state_file = tensors.write(self.folder / "state", state, {"format": "pt"})
        self._expected = codec.read_table(state_file)
        state_file.unlink()
        self._path = self.folder / "update"

    def seeds(self) -> Sequence[bytes]:
        found: list[bytes] = []
        for kind in ("delta", "state", "gradient"):
            for dtype in ("F32", "F16", "BF16"):
                arrays = {name: (array + 0.5).astype(tensors.DTYPES[dtype]) for name, array in self._arrays.items()}
                found.append(tensors.write(self._path, arrays, {aggregate.KIND_KEY: kind}).read_bytes())
        partly = {"b.lora_B": np.array([1.0, -2.0, 3.0, 1e30], np.float32)}
        found.append(tensors.write(self._path, partly, {aggregate.KIND_KEY: "delta"}).read_bytes())
        return found

    def run(self, data: bytes) -> str:
        self._path.write_bytes(data)
        try:
            facts = aggregate.inspect(self._path, self._expected, slab_bytes=64)
        except WireError as error:
            return outcome_of(error)
        table = codec.parse_header(data, len(data))
        values = np.frombuffer(data[table.data_start :], tensors.DTYPES[facts.dtype]).astype(np.float64)
        assert facts.finite and np.isfinite(values).all()
        assert math.isclose(facts.norm, float(np.linalg.norm(values)), rel_tol=1e-9, abs_tol=1e-300)
        assert set(facts.names) <= set(self._expected.names)
        return f"{facts.kind} {facts.dtype} {len(facts.names)}"


# --- chunks ---------------------------------------------------------------------------------------------------------------------


class Frames(Target):
    """What our decoder of chunk messages takes, protobuf's own takes with the same meaning, and the other way round.

    Two things it refuses by design and protobuf does not: a second chunk in a message, and groups (which proto3 does not have).
    """

    name = "frames"
    modules = ("fleetune.wire.frames",)
    share = 64
    words = (
        b"\x12",
        b"\x0a",
        b"\x08",
        b"\x1d",
        b"\xff" * 9 + b"\x01",
        b"\xff" * 10,
        b"\x80\x00",
        b"\x00",
        b"\x0b",
        b"\x0c",
        b"\x12\x00",
        b"\x92\x00",
    )

    def seeds(self) -> Sequence[bytes]:
        header = blob_pb2.UploadHeader(device_id="device-0001", task_id="j/1/device-0001/train", lease=7, offset=3)
        header.blob.digest, header.blob.size_bytes = "0" * 64, 9
        header.report.samples = 12
        chunk = frames.chunk_of(2**40, b"some bytes of a blob")
        return [
            frames.encode_upload(frames.Upload(header, None)),
            frames.encode_upload(frames.Upload(None, chunk)),
            frames.encode_upload(frames.Upload(header, chunk)),
            frames.encode_download(frames.Download(chunk, 77)),
            frames.encode_download(frames.Download(frames.chunk_of(0, b"x"), 0)),
            frames.encode_download(frames.Download(None, 2**63)),
        ]

    def run(self, data: bytes) -> str:
        return f"{self._compare(data, blob_pb2.UploadRequest)} | {self._compare(data, blob_pb2.DownloadResponse)}"

    def _compare(self, data: bytes, kind: type[blob_pb2.UploadRequest] | type[blob_pb2.DownloadResponse]) -> str:
        try:
            theirs: blob_pb2.UploadRequest | blob_pb2.DownloadResponse | None = kind.FromString(data)
        except DecodeError:
            theirs = None
        upload = kind is blob_pb2.UploadRequest
        try:
            ours: frames.Upload | frames.Download = frames.decode_upload(data) if upload else frames.decode_download(data)
        except WireError as error:
            by_design = any(words in str(error) for words in ("two chunks", "wire type 3", "wire type 4"))
            if theirs is not None and not by_design:
                raise AssertionError(f"we refuse what protobuf takes: {error}") from error
            return outcome_of(error)
        assert theirs is not None, "we take what protobuf refuses"
        assert (ours.chunk is not None) == theirs.HasField("chunk")
        if ours.chunk is not None:
            assert (ours.chunk.offset, bytes(ours.chunk.data), ours.chunk.crc32) == (
                theirs.chunk.offset,
                theirs.chunk.data,
                theirs.chunk.crc32,
            )
        if isinstance(ours, frames.Upload) and isinstance(theirs, blob_pb2.UploadRequest):
            assert (ours.header is not None) == theirs.HasField("header")
            assert ours.header is None or ours.header == theirs.header
            assert frames.decode_upload(frames.encode_upload(ours)) == ours
        elif isinstance(ours, frames.Download) and isinstance(theirs, blob_pb2.DownloadResponse):
            assert ours.size_bytes == theirs.size_bytes
            assert frames.decode_download(frames.encode_download(ours)) == ours
        return f"taken, chunk {ours.chunk is not None}"


class Spool(OnDisk):
    """Any sequence of chunks, cuts and damages: the file holds exactly what was taken, and only the whole blob is finished.

    The bytes are a program: two bytes choose a deed and its variant, two more its offset and length.
    """

    name = "spool"
    modules = ("fleetune.wire.chunks", "fleetune.wire.digests")
    share = 8
    words = (b"\x00\x00\x00\xff", b"\x05\x00\x00\x00", b"\x06\x00\x00\x00", b"\x07\x00\x00\x00")

    def __init__(self) -> None:
        super().__init__()
        self._blob = random.Random(7).randbytes(600)
        self._digest = digests.of_bytes(self._blob)
        self._path = self.folder / "spool"
        self._target = self.folder / "blob"

    def seeds(self) -> Sequence[bytes]:
        def add(begin: int, length: int) -> bytes:
            return bytes((0, 0, begin // 4, length // 4))

        whole = add(0, 200) + add(200, 200) + add(400, 200)
        again, finish, anew, damage, second = (bytes((deed, 0, 0, 0)) for deed in range(5, 10))
        return [
            whole + finish,
            add(0, 300) + again + add(200, 400) + finish,
            add(0, 300) + damage + again + add(300, 300) + finish,
            bytes((1, 0, 0, 50)) + bytes((2, 0, 0, 50)) + bytes((3, 0, 140, 50)) + bytes((4, 0, 0, 50)) + whole,
            add(0, 100) + anew + whole + second + finish,
        ]

    def run(self, data: bytes) -> str:
        spool = self._open()
        taken = bytearray()
        story: list[str] = []
        try:
            for at in range(0, min(len(data), 400) - 3, 4):
                deed, variant, offset, length = data[at] % 10, data[at + 1], 4 * data[at + 2], 4 * data[at + 3]
                if deed <= 4:
                    story.append(self._add(spool, taken, deed, variant, offset, length))
                elif deed == 6:
                    story.append(self._finish(spool, taken))
                    break
                elif deed == 9:
                    story.append(self._open_twice())
                else:
                    if deed == 7:
                        spool.discard()
                        taken.clear()
                    else:  # the stream was cut, or the coordinator restarted
                        spool.close()
                        self._damage(taken, offset, variant if deed == 8 else 0)
                    story.append(f"opened {deed}")
                    spool = self._open()
                assert spool.position == len(taken), (spool.position, len(taken))
                assert self._path.read_bytes() == taken, "the file holds other bytes than those taken"
        finally:
            spool.discard()
            left = self.left()
            for name in left:
                (self.folder / name).unlink()
        assert left == (["blob"] if story[-1:] == ["finished"] else []), left
        return "deeds: " + " ".join(sorted(set(story)))

    def _open(self) -> chunks.Spool:
        return chunks.Spool(self._path, self._digest, len(self._blob), limit_bytes=1000)

    def _open_twice(self) -> str:
        try:
            self._open().close()
        except chunks.SpoolBusyError:
            return "busy"
        raise AssertionError("two writers have one spool")

    def _damage(self, taken: bytearray, offset: int, variant: int) -> None:
        """On disk, while nobody has it open; a cut file, too."""
        if not variant or not taken:
            return
        if variant > 200:
            del taken[offset % len(taken) :]
        else:
            taken[offset % len(taken)] ^= 1 << variant % 8
        self._path.write_bytes(taken)

    def _add(self, spool: chunks.Spool, taken: bytearray, deed: int, variant: int, offset: int, length: int) -> str:
        if deed == 3:  # past the end
            offset += len(self._blob) - 300
        if deed == 4:
            offset += (0, 2**32, 2**63, 2**64 - 2000)[variant % 4]
        payload = bytearray(self._blob[offset : offset + length].ljust(length, b"\0"))
        if deed == 2 and payload:  # other bytes, with a checksum that fits them
            payload[variant % len(payload)] ^= 0x40
        crc32 = checksums.crc32(payload) ^ (deed == 1)
        end, known = offset + length, taken[offset : offset + length]
        rightful = length and deed != 1 and end <= len(self._blob) and offset <= len(taken) and payload[: len(known)] == known
        try:
            spool.add(frames.Chunk(offset, bytes(payload), crc32))
        except WireError as error:
            said = outcome_of(error)[:60]
            refused = True
        else:
            said, refused = "added", False
        assert refused == (not rightful), said
        if not refused:
            taken += payload[len(known) :]
        return said

    def _finish(self, spool: chunks.Spool, taken: bytearray) -> str:
        try:
            spool.finish(fsync=False, move_to=self._target)
        except WireError as error:
            said = outcome_of(error)[:60]
        else:
            said = "finished"
        assert (said == "finished") == (taken == self._blob), said
        assert said != "finished" or self._target.read_bytes() == self._blob
        return said


# --- files of settings ----------------------------------------------------------------------------------------------------------


_TOML_WORDS = (
    *(
        b"[",
        b"]",
        b"[[",
        b"]]",
        b"=",
        b".",
        b'"',
        b'"""',
        b"'",
        b"#",
        b"\n",
        b"{}",
        b"{a=1}",
        b"[1]",
        b"nan",
        b"inf",
        b"-0",
        b"1e400",
        b"0x7f",
    ),
    *(
        b"9223372036854775808",
        b"9" * 5000,
        b"1979-05-27T07:32:00Z",
        b"1979-13-27",
        b"\\u0000",
        b"\\ud800",
        b"\x00",
        b"\xff",
        b"\xe2\x80\xae",
    ),
    *(b"[" * 1500, b"a." * 300, b"{a=" * 1200),
)


@functools.cache
def _setting_words() -> tuple[bytes, ...]:
    names = [f"{section}.{name}".strip(".") for section, model in jobspec.section_models().items() for name in model.model_fields]
    return tuple(name.encode() for name in names)


def check_complaints(error: ComplaintsError) -> None:
    assert error.complaints
    for complaint in error.complaints:
        assert len(complaint.value) <= 80 and complaint.value.isprintable(), complaint
        assert len(complaint.path) <= 400 and complaint.path.isprintable(), complaint


_RANKS = (b'\n[method.ranks]\n"kitchen-pi" = 2\n"*" = 4\n', b'\n[method.ranks]\n"x" = 0\n')
"""The one table within a section."""


class JobFile(Target):
    """A job file is a complete job or a list of complaints; both travel and are logged, so they are printable and of bounded length."""

    name = "job-file"
    modules = (
        "fleetune.coordinator.jobspec",
        "fleetune.coordinator.jobrules",
        "fleetune.coordinator.loraranks",
        "fleetune.coordinator.overrides",
        "fleetune.tomltext",
        "fleetune.complaints",
    )
    share = 4
    memory_bytes_max = 16 * MIB

    def __init__(self) -> None:
        self.words = (*_TOML_WORDS, *_setting_words())

    def seeds(self) -> Sequence[bytes]:
        return [re.sub(rb"(?m)^\s*#.*\n", b"", path.read_bytes()) for path in sorted(JOBS.glob("*.toml"))] + [
            b"",
            b'name = "x"\n[method]\nname = "echo"\n',
            *(re.sub(rb"(?m)^\s*#.*\n", b"", (JOBS / "text-classification.toml").read_bytes()) + ranks for ranks in _RANKS),
        ]

    def run(self, data: bytes) -> str:
        text = data.decode("utf-8", "replace")  # protobuf and the file reader let only UTF-8 through
        try:
            spec = jobspec.parse(text)
        except jobspec.JobFileError as error:
            check_complaints(error)
            return outcome_of(error)
        assert jobspec.parse(text) == spec
        again = overrides.apply(text, ["seed=3"])
        assert jobspec.parse(again).seed == 3
        assert 1 <= loraranks.rank_of(spec, "kitchen-pi") <= spec.lora.rank and loraranks.scale(spec) > 0.0
        return f"a job of {spec.method.name}, {spec.task.kind}"


class SettingFiles(OnDisk):
    """Both daemons' configuration files give settings within their bounds, or complaints."""

    name = "settings"
    modules = ("fleetune.settings", "fleetune.coordinator.config", "fleetune.agent.config", "fleetune.agent.limits", "fleetune.complaints")
    share = 4
    memory_bytes_max = 16 * MIB

    def __init__(self) -> None:
        super().__init__()
        rows = (*coordinator_config.SETTINGS, *agent_config.SETTINGS)
        self.words = (
            *_TOML_WORDS,
            *(row.path.encode() for row in rows),
            b'"~nobody/x"',
            b'"22:00-06:00"',
            b'"*"',
            b"listen",
            b"::1",
            b":0",
        )

    def seeds(self) -> Sequence[bytes]:
        files = [path.read_bytes() for path in sorted((ROOT / "deploy" / "config").glob("*.toml"))]
        plain = [re.sub(rb"(?m)\s*#.*$", b"", text) for text in files]
        return [
            *plain,
            b'[data.a]\ntrain = "x.jsonl"\n[models]\n"a/b" = "~/m"\n',
            b'[limits]\nhours = ["22:00-06:00"]\n[training]\ncores = 2\n',
        ]

    def run(self, data: bytes) -> str:
        path = self.folder / "x.toml"
        path.write_bytes(data)
        return f"{self._read(coordinator_config.load, path)} | {self._read(agent_config.load, path)}"

    def _read(self, load: Callable[..., coordinator_config.CoordinatorConfig | agent_config.AgentConfig], path: Path) -> str:
        try:
            found = load(path, {}, home=self.folder, working_folder=self.folder)
        except ConfigError as error:
            if isinstance(error, ComplaintsError):
                check_complaints(error)
            return _CHANGING.sub("#", str(error).replace(str(path), ""))[:160]
        assert found.state_dir.is_absolute()
        if isinstance(found, coordinator_config.CoordinatorConfig):
            assert math.isfinite(found.lease_s) and 2 * found.heartbeat_s <= found.lease_s
        else:
            assert found.cache_max_bytes > 0
        return "taken"


# --- messages -------------------------------------------------------------------------------------------------------------------


class ChildLines(Target):
    """Each line of a parent gets exactly one answer that is JSON; each line of a child is an answer or a WireError."""

    name = "child-lines"
    modules = ("fleetune.child.answers", "fleetune.child.entry")
    share = 8
    words = (
        b'"id":',
        b'"op":',
        b'"event":',
        b'"result":',
        b'"error":',
        b"7",
        b'"echo"',
        b'"fail"',
        b"null",
        b"NaN",
        b"[" * 1200,
        b'{"id":' * 700,
        b"\n",
        b"9" * 5000,
    )
    memory_bytes_max = 16 * MIB

    def seeds(self) -> Sequence[bytes]:
        lines: list[dict[str, object]] = [
            {"id": 7, "op": "echo", "value": 1},
            {"id": 7, "op": "fail"},
            {"id": 7, "event": "progress", "stage": "training", "done": 3, "total": 12, "loss": 0.5},
            {"id": 7, "result": {"digest": "0" * 64, "size_bytes": 3}},
            {"id": 7, "error": {"kind": "data", "stage": "train", "message": "no rows", "traceback": "..."}},
        ]
        return [json.dumps(line).encode() for line in lines]

    def run(self, data: bytes) -> str:
        try:
            answer = answers.read(data, 7)
        except WireError as error:
            said = outcome_of(error)
        else:
            said = type(answer).__name__
            if isinstance(answer, answers.Error):
                assert all(isinstance(text, str) for text in (answer.kind, answer.stage, answer.message, answer.traceback))
        return f"{said} | {self._serve(data)}"

    def _serve(self, line: bytes) -> str:
        sent: list[dict[str, Any]] = []

        def send(message: Mapping[str, object]) -> None:
            sent.append(json.loads(json.dumps(entry._finite(message), allow_nan=False)))

        entry._answer(line, {"echo": lambda fields, emit: {"keys": len(fields)}, "fail": _fails}, send)
        ends = [message for message in sent if "result" in message or "error" in message]
        assert len(sent) == len(ends) == 1, sent
        error = ends[0].get("error")
        return "result" if error is None else f"{error['kind']} {_CHANGING.sub('#', error['message'])[:60]}"


def _fails(_fields: Mapping[str, object], _emit: entry.Emit) -> dict[str, object]:
    raise DataError("no rows.")


_DEVICE = "device-0001"
_TASK = "job-1/1/device-0001/train"


class FleetMessages(Target):
    """What an agent says becomes our own nouns: printable, bounded, and stored in a job's record so that the record reads back the same."""

    name = "fleet-messages"
    modules = ("fleetune.coordinator.rpc.convert", "fleetune.coordinator.registry", "fleetune.coordinator.rounds.machine")
    share = 24
    words = (
        b"\x0a",
        b"\x12",
        b"\x1a",
        b"\x22",
        b"device-0001",
        _TASK.encode(),
        b"\xe2\x80\xae",
        b"\x1b[31m",
        b"<script>",
        b"\n",
        b"\xff",
        *(number.to_bytes(8, "little") for number in (0x7FF8 << 48, 0x7FF0 << 48, 0xFFF0 << 48, 0x7FEF_FFFF_FFFF_FFFF)),
    )
    memory_bytes_max = 4 * MIB

    def __init__(self) -> None:
        # The registry and the objections ask nothing of the engine and the database.
        nothing: Any = None
        self._service = FleetService(nothing, nothing, nothing, version="0", heartbeat_s=5.0, epoch=1)

    def seeds(self) -> Sequence[bytes]:
        hello = fleet_pb2.Hello(
            protocol_major=1, device_id=_DEVICE, device_name="kitchen-pi", instance_id="i-1", tags=["pi5"], data_names=["q"]
        )
        hello.methods.append("echo")
        hello.availability.reason = "on battery"
        failure = messages_pb2.Failure(kind=messages_pb2.FAILURE_KIND_DATA, stage="train", message="no rows", traceback="Traceback\n  x")
        evaluation = messages_pb2.Evaluation(metrics=[messages_pb2.Metric(name="loss", value=0.5)], rows=10)
        reports: list[bytes] = []
        header = blob_pb2.UploadHeader(device_id=_DEVICE, task_id=_TASK, lease=1)
        header.blob.digest, header.blob.size_bytes, header.report.samples = "0" * 64, 9, 12
        header.report.metrics.add(name="loss", value=0.25)
        header.report.seconds.add(name="training", value=1.5)
        seeds: list[Message] = [hello, failure, evaluation, header, fleet_pb2.TaskLog(task_id=_TASK, lines=["a", "b\x1b"])]
        for told in (fedspine_pb2.FedspineReport(structure=b"FTST", steps=60, loss_before=2.0), deft_pb2.DeftReport(steps=1, step_s=0.5)):
            reporting = blob_pb2.UploadHeader.FromString(header.SerializeToString())
            reporting.report.payload.Pack(told)
            reporting.report.figures.CopyFrom(messages_pb2.Figures(batch_rows=8, step_s=[0.5], step_bytes=[9], source="measured"))
            for name in ("loss_before", "loss_after", "update_norm", "step_s", "steps", "sparsity"):
                reporting.report.metrics.add(name=name, value=0.5)
            reports.append(b"\x03" + reporting.SerializeToString())
        outcome = fleet_pb2.TaskOutcome(task_id=_TASK, lease=1)
        outcome.figures.CopyFrom(messages_pb2.Figures(batch_rows=8, step_s=[0.5, 0.75], step_bytes=[9, 99], room_bytes=200, margin=1.1))
        seeds.append(outcome)
        return [*(bytes((place,)) + message.SerializeToString() for place, message in enumerate(seeds)), *reports]

    def run(self, data: bytes) -> str:
        if not data:
            return "empty"
        readers = (self._hello, self._failure, self._evaluation, self._update, self._log, self._told)
        try:
            return readers[data[0] % len(readers)](data[1:])
        except DecodeError:  # gRPC ends such a call by itself
            return "no message"

    def _hello(self, raw: bytes) -> str:
        hello = fleet_pb2.Hello.FromString(raw)
        convert.sober(hello)
        assert 0.0 <= hello.profile.cores <= convert.CORES_MAX and hello.profile.board.isprintable()
        refusal = self._service._objection(hello)
        greeting = convert.greeting(hello, "ipv4:192.0.2.7:5")
        assert _line(greeting.reason, 200)
        if refusal is not None:
            assert refusal.message.isprintable() and len(refusal.message) <= 400, refusal
            return f"refused {_CHANGING.sub('#', refusal.message)}"
        registry = Registry(15.0)
        registry.admit(greeting, 0.0)
        assert greeting.name.isprintable() and greeting.device_id.isprintable()
        return f"admitted, {len(greeting.tags)} tags"

    def _failure(self, raw: bytes) -> str:
        failure = convert.failure(messages_pb2.Failure.FromString(raw))
        assert _line(failure.stage, 40) and _clean(failure.message, convert.TEXT_CHARS_MAX)
        assert _clean(failure.traceback, convert.TRACEBACK_CHARS_MAX)
        convert.failure_message(failure).SerializeToString()
        return f"{failure.kind} {_stored(machine.TaskFailed(_TASK, failure))}"

    def _evaluation(self, raw: bytes) -> str:
        evaluation = convert.evaluation(messages_pb2.Evaluation.FromString(raw))
        assert 0 <= evaluation.rows <= convert.ROWS_MAX and _figures(evaluation.metrics)
        found = machine.weighted_means([evaluation, evaluation])
        return f"{len(found)} {_stored(machine.EvaluationArrived(_TASK, evaluation))}"

    def _update(self, raw: bytes) -> str:
        update = convert.update(blob_pb2.UploadHeader.FromString(raw))
        assert _figures(update.metrics) and _figures(update.seconds)
        try:
            digests.check(update.blob.digest)
        except WireError as error:
            return outcome_of(error)
        # As admission keeps it: what the method says of itself goes no further.
        return f"update {_stored(machine.UpdateArrived(_TASK, replace(update, report=b'')))}"

    def _told(self, raw: bytes) -> str:
        """Figures that are taken can be planned with, whatever they are."""
        figures = convert.figures(fleet_pb2.TaskOutcome.FromString(raw).figures)
        if figures is None:
            return "no figures"
        assert list(figures.step_s) == sorted(figures.step_s) and list(figures.step_bytes) == sorted(figures.step_bytes)
        if len(figures.step_s) > 5:
            return f"figures {_stored(machine.FiguresArrived(_TASK, figures))}"
        link = convert.link(messages_pb2.Link(up_bits_per_s=figures.flops_per_s, down_bits_per_s=figures.tokens_per_s))
        blocks = tuple(DepthBlock(f"layer.{depth}", ("w",), 1000) for depth in range(len(figures.step_s)))
        pair = (Candidate(_DEVICE, "a", link=link), Candidate(_DEVICE[::-1], "b"))
        told = {device.device_id: figures for device in pair}
        for layout in planning.LAYOUTS:
            request = PlanRequest(PlanSettings(layout=layout), 1, 0, blocks, 1000, pair, told, {}, (0,) * len(blocks))
            made = planning.plan_round(request)
            assert isinstance(made, str) or all(math.isfinite(part.finish_s) for part in made.parts)
        return f"planned {_stored(machine.FiguresArrived(_TASK, figures))}"

    def _log(self, raw: bytes) -> str:
        lines = [convert.line(text, 1000) for text in fleet_pb2.TaskLog.FromString(raw).lines]
        assert all(_line(line, 1000) for line in lines)
        return f"{min(len(lines), 5)} lines"


def _clean(text: str, limit: int) -> bool:
    return len(text) <= limit and all(c.isprintable() or c in "\n\t" for c in text)


def _line(text: str, limit: int) -> bool:
    return len(text) <= limit and text.isprintable()


def _figures(found: Mapping[str, float]) -> bool:
    return len(found) <= 64 and all(_line(name, 64) for name in found)


_PLAN = machine.JobPlan("job-1", 2, 1, 0, 0.5, 0.0, 0.0, 0, "none", 1, "loss", 0, 0.0, 15.0)


def _stored(event: machine.Event) -> str:
    """Apply the event to a job of one device; its record must read back as it was written."""
    job = machine.JobMachine(_PLAN)
    job.handle(machine.Started(), 1.0)
    job.handle(machine.PreparedEvent(Prepared(Blob("0" * 64, 8), "0" * 64)), 1.0)
    job.handle(machine.Offered((Candidate(_DEVICE, "kitchen-pi"),)), 1.0)
    job.handle(event, 2.0)
    text = records.dump_machine(job)
    assert records.dump_machine(records.load_machine(text)) == text
    return job.status


class AgentMessages(Target):
    """What a coordinator says becomes an agent's nouns: times and sizes within what clocks, files and SQLite can hold."""

    name = "agent-messages"
    modules = ("fleetune.agent.convert", "fleetune.wire.basefiles")
    share = 8
    words = (b"\x0a", b"\x12", b"\x42", b"config.json", b"../../x", b"/etc/passwd", b"\x00", b"0" * 64, *FleetMessages.words[-4:])

    def seeds(self) -> Sequence[bytes]:
        files = (basefiles.BaseFile("config.json", "1" * 64, 10), basefiles.BaseFile("model.safetensors", "2" * 64, 2**32))
        task = messages_pb2.Task(
            task_id=_TASK,
            job_id="job-1",
            round=1,
            lease=1,
            kind=messages_pb2.TASK_KIND_TRAIN,
            method="echo",
            keep_warm_s=120.0,
            deadline_s=60.0,
        )
        task.state.digest, task.state.size_bytes = "0" * 64, 9
        task.base.digest, task.base.hub_id = basefiles.base_digest(files), "org/name"
        for file in files:
            task.base.files.add(name=file.name).blob.CopyFrom(messages_pb2.BlobRef(digest=file.digest, size_bytes=file.size_bytes))
        pruning, planned = (messages_pb2.Task.FromString(task.SerializeToString()) for _ in range(2))
        pruning.method, planned.method, planned.kind = "fedspine", "deft", messages_pb2.TASK_KIND_MEASURE
        pruning.payload.Pack(fedspine_pb2.FedspineTask(structure=b"FTST", sparsity_after=0.5, events=3, tau=20, rank=4, scale=2.0))
        planned.payload.Pack(deft_pb2.DeftTask(depths=[1, 2], depth_count=6, batch_size=8, steps=1))
        others = [b"\x00" + message.SerializeToString() for message in (pruning, planned)]
        seeds: list[Message] = [
            task,
            fleet_pb2.Welcome(heartbeat_s=5.0, lease_s=15.0, epoch=3, chunk_bytes=1 << 20, coordinator_version="0.1.0"),
            messages_pb2.Receipt(task_id=_TASK, lease=1, status=messages_pb2.RECEIPT_STATUS_ACCEPTED, reason="fine"),
        ]
        return [*(bytes((place,)) + message.SerializeToString() for place, message in enumerate(seeds)), *others]

    def run(self, data: bytes) -> str:
        if not data:
            return "empty"
        readers = (self._task, self._welcome, self._receipt)
        try:
            return readers[data[0] % len(readers)](data[1:])
        except DecodeError:
            return "no message"
        except WireError as error:
            return outcome_of(error)

    def _task(self, raw: bytes) -> str:
        task = agent_convert.task(messages_pb2.Task.FromString(raw), epoch=3)
        assert 0 <= task.keep_warm_s < 1e9, task.keep_warm_s
        blobs = [blob for blob in (task.state,) if blob is not None]
        assert all(0 <= blob.size_bytes <= INTEGER_MAX for blob in blobs), blobs
        if task.base is not None:
            for file in task.base.files:
                assert Path(file.name).name == file.name and file.name not in ("", ".", ".."), file.name
                assert 0 <= file.size_bytes <= INTEGER_MAX
        return f"{task.kind} {task.method[:8]} base={task.base is not None} state={task.state is not None}"

    def _welcome(self, raw: bytes) -> str:
        welcome = agent_convert.welcome(fleet_pb2.Welcome.FromString(raw))
        assert 0.05 <= welcome.heartbeat_s <= 300, welcome.heartbeat_s
        assert 2 * welcome.heartbeat_s <= welcome.lease_s < 1e9, welcome.lease_s
        assert chunks.MIN_CHUNK_BYTES <= welcome.chunk_bytes <= chunks.CHUNK_BYTES
        return "welcome"

    def _receipt(self, raw: bytes) -> str:
        return str(agent_convert.receipt(messages_pb2.Receipt.FromString(raw)).status)


# --- who somebody is ------------------------------------------------------------------------------------------------------------


_FACTS = identity.Facts("agent", "kitchen-pi", "", "192.0.2.7:7433", identity.SERVER_NAME, 1.0, 2.0)


class Identities(OnDisk):
    """Join lines, files of an identity, names in certificates: refused or whole, and no error repeats a token."""

    name = "identities"
    share = 4
    modules = ("fleetune.wire.identity", "fleetune.wire.joinline", "fleetune.coordinator.principal")
    words = (
        *(
            b"ft1/",
            b"/7434/",
            b"[::1]:7433",
            b"192.0.2.7:7433",
            b"=" * 4,
            b"-_" * 11,
            b"\x00",
            b"\xff",
            b"1e999",
            b"NaN",
            b'"kind": "agent"',
        ),
        *(b"urn:fleetune:agent", b"urn:fleetune:agent:", b"urn:fleetune:operator:admin", b"\n", b"../", b"a" * 64, b'"operator"', b"null"),
    )

    def seeds(self) -> Sequence[bytes]:
        line = joinline.JoinLine("192.0.2.7:7433", 7434, bytes(range(32)), "t0ken-" * 4)
        facts = {name: getattr(_FACTS, name) for name in identity.Facts.__dataclass_fields__}
        names = ["kitchen-pi\nurn:fleetune:agent:0123456789abcdef", "kitchen-pi\nurn:fleetune:agent", "ada\nurn:fleetune:operator:view"]
        whole = {"facts": facts, "key": "key", "certificate": "certificate", "roots": "roots"}
        stored = [json.dumps(facts), "p" + json.dumps(whole)]
        return [b"\x00" + line.text().encode(), *(b"\x01" + text.encode() for text in stored), *(b"\x02" + name.encode() for name in names)]

    def run(self, data: bytes) -> str:
        if not data:
            return "empty"
        readers = (self._line, self._facts, self._names)
        try:
            return readers[data[0] % len(readers)](data[1:])
        except ConfigError as error:
            return outcome_of(error)

    def _line(self, raw: bytes) -> str:
        text = raw.decode("utf-8", "replace")
        try:
            line = joinline.parse(text)
        except ConfigError as error:
            return _untold(text, str(error))
        assert joinline.parse(line.text()) == line
        assert line.token not in repr(line) or line.token in line.address
        return "line"

    def _facts(self, raw: bytes) -> str:
        pending = raw[:1] == b"p"
        place = self.folder / (identity.PENDING_FILE if pending else identity.FACTS_FILE)
        place.touch(0o600)
        place.write_bytes(raw[1:] if pending else raw)
        for name in (identity.KEY_FILE, identity.CERTIFICATE_FILE, identity.ROOTS_FILE):
            (self.folder / name).touch(0o600)
        try:
            found = identity.load(self.folder)
            assert found is not None
            return f"{'pending' if pending else 'stored'} {identity.trouble(found.facts, 1.5)[:10]}"
        finally:
            for path in self.folder.iterdir():
                path.unlink()

    def _names(self, raw: bytes) -> str:
        name, *others = raw.decode("utf-8", "replace").split("\n")
        found = principal.read(name, others, "0" * 64)
        if found is None:
            return "nobody"
        assert principal.NAME.fullmatch(found.name)
        assert (found.kind == "agent") == (found.role is principal.Role.NONE)
        return f"{found.kind} id={bool(found.device_id)}"


def _untold(line: str, said: str) -> str:
    """What an error says, which must not be the token."""
    token = line.strip().rpartition("/")[2]
    assert len(token) < 16 or token not in said, said
    return _CHANGING.sub("#", said)[:80]


KINDS: tuple[type[Target], ...] = (
    *(TensorHeader, UpdateFile, Frames, Spool, JobFile, SettingFiles, ChildLines, FleetMessages, AgentMessages),
    Identities,
)
