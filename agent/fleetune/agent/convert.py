"""Protobuf messages to the agent's own nouns and back; the rest of the daemon sees no protobuf."""

from __future__ import annotations

import math

from fleetune.agent.domain import (
    Base,
    Blob,
    Evaluated,
    Failed,
    FailureKind,
    Measured,
    Receipt,
    ReceiptStatus,
    Refused,
    Task,
    TaskKind,
    Update,
    Welcome,
)
from fleetune.errors import WireError
from fleetune.v1 import blob_pb2, fleet_pb2, messages_pb2
from fleetune.wire import basefiles, chunks, digests

TRACEBACK_CHARS_MAX = 8 * 1024
MESSAGE_CHARS_MAX = 2 * 1024
IDENTIFIER_CHARS_MAX = 512
BASE_FILES_MAX = 1024
# The first of the protocol in which an upload hears its turn.
_TURNS_MINOR = 3
# SQLite's integers are signed.
INTEGER_MAX = 2**63 - 1
# What settings of the other side allow at the most; a clock must never be asked for NaN, infinity or a century.
HEARTBEAT_S_MAX = 300.0
LEASE_S_MAX = 86_400.0
KEEP_WARM_S_MAX = 86_400.0

_FAILURE_KINDS = {
    FailureKind.DATA: messages_pb2.FAILURE_KIND_DATA,
    FailureKind.MODEL: messages_pb2.FAILURE_KIND_MODEL,
    FailureKind.OUT_OF_MEMORY: messages_pb2.FAILURE_KIND_OUT_OF_MEMORY,
    FailureKind.NOT_FINITE: messages_pb2.FAILURE_KIND_NOT_FINITE,
    FailureKind.DISK_FULL: messages_pb2.FAILURE_KIND_DISK_FULL,
    FailureKind.CRASH: messages_pb2.FAILURE_KIND_CRASH,
    FailureKind.UNSUPPORTED: messages_pb2.FAILURE_KIND_UNSUPPORTED,
    FailureKind.TRANSFER: messages_pb2.FAILURE_KIND_TRANSFER,
    FailureKind.INTERNAL: messages_pb2.FAILURE_KIND_INTERNAL,
}
_TASK_KINDS = {
    messages_pb2.TASK_KIND_TRAIN: TaskKind.TRAIN,
    messages_pb2.TASK_KIND_EVALUATE: TaskKind.EVALUATE,
    messages_pb2.TASK_KIND_MEASURE: TaskKind.MEASURE,
}
_RECEIPT_STATUSES = {
    messages_pb2.RECEIPT_STATUS_ACCEPTED: ReceiptStatus.ACCEPTED,
    messages_pb2.RECEIPT_STATUS_DUPLICATE: ReceiptStatus.DUPLICATE,
    messages_pb2.RECEIPT_STATUS_LATE: ReceiptStatus.LATE,
    messages_pb2.RECEIPT_STATUS_REFUSED: ReceiptStatus.REFUSED,
}
# The training child's words for what it does.
_STAGES = {
    "queued": fleet_pb2.TASK_STAGE_QUEUED,
    "fetching_base": fleet_pb2.TASK_STAGE_FETCHING_BASE,
    "fetching_state": fleet_pb2.TASK_STAGE_FETCHING_STATE,
    "loading": fleet_pb2.TASK_STAGE_LOADING,
    "matmul": fleet_pb2.TASK_STAGE_MEASURING,
    "measuring": fleet_pb2.TASK_STAGE_MEASURING,
    "training": fleet_pb2.TASK_STAGE_TRAINING,
    "writing": fleet_pb2.TASK_STAGE_TRAINING,
    "evaluating": fleet_pb2.TASK_STAGE_EVALUATING,
    "uploading": fleet_pb2.TASK_STAGE_UPLOADING,
}


def task(message: messages_pb2.Task, epoch: int) -> Task:
    """A task as received under `epoch`. WireError names the field that breaks the protocol."""
    if not 0 < len(message.task_id) <= IDENTIFIER_CHARS_MAX:
        raise WireError(f"A task came with an id of {len(message.task_id)} characters; 1 to {IDENTIFIER_CHARS_MAX} are allowed.")
    if message.lease > INTEGER_MAX or epoch > INTEGER_MAX:
        raise WireError(f"Task {message.task_id} has the lease {message.lease} and epoch {epoch}; {INTEGER_MAX} is the most.")
    kind = _TASK_KINDS.get(message.kind)
    if kind is None:
        raise WireError(f"Task {message.task_id} has the kind {message.kind}, which this agent does not know.", "Update the agent.")
    return Task(
        task_id=message.task_id,
        lease=message.lease,
        epoch=epoch,
        job_id=message.job_id,
        round=message.round,
        kind=kind,
        method=message.method,
        data_name=message.recipe.data.name,
        base=_base(message.base) if message.HasField("base") else None,
        state=_blob(message.state) if message.HasField("state") else None,
        keep_warm_s=_within(message.keep_warm_s, 0.0, KEEP_WARM_S_MAX, 0.0),
        uplink_bits_per_s=rate(message.uplink),
        encoded=message.SerializeToString(),
    )


def rate(message: messages_pb2.UplinkRate) -> float:
    """Bits a second; 0, no bound, also for what is no rate."""
    return message.bits_per_s if math.isfinite(message.bits_per_s) and message.bits_per_s > 0 else 0.0


def receipt(message: messages_pb2.Receipt) -> Receipt:
    """A receipt; one with an unknown status still ends the resending."""
    status = _RECEIPT_STATUSES.get(message.status, ReceiptStatus.REFUSED)
    return Receipt(message.task_id, message.lease, status, message.reason)


def welcome(message: fleet_pb2.Welcome) -> Welcome:
    """The coordinator's wishes, held within what makes sense."""
    heartbeat_s = _within(message.heartbeat_s, 0.05, HEARTBEAT_S_MAX, 5.0)
    chunk_bytes = message.chunk_bytes or chunks.CHUNK_BYTES
    return Welcome(
        heartbeat_s=heartbeat_s,
        lease_s=_within(message.lease_s, 2 * heartbeat_s, LEASE_S_MAX, 3 * heartbeat_s),
        epoch=message.epoch,
        chunk_bytes=min(max(chunk_bytes, chunks.MIN_CHUNK_BYTES), chunks.CHUNK_BYTES),
        coordinator_version=message.coordinator_version,
        tells_turns=message.protocol_minor >= _TURNS_MINOR,
    )


def outcome(result: Evaluated | Measured | Failed | Refused) -> fleet_pb2.TaskOutcome:
    """The end of a task that sends no tensors."""
    message = fleet_pb2.TaskOutcome(task_id=result.task_id, lease=result.lease, epoch=result.epoch)
    if isinstance(result, Evaluated):
        message.evaluation.ParseFromString(result.evaluation)
    elif isinstance(result, Measured):
        message.figures.ParseFromString(result.figures)
    elif isinstance(result, Refused):
        message.refusal.reason = result.reason
    else:
        message.failure.kind = _FAILURE_KINDS[result.kind]
        message.failure.stage = result.stage
        message.failure.message = result.message[:MESSAGE_CHARS_MAX]
        message.failure.traceback = result.traceback[-TRACEBACK_CHARS_MAX:]
    return message


def upload_header(update: Update, device_id: str, offset: int) -> blob_pb2.UploadHeader:
    """What goes before the bytes of an update."""
    return blob_pb2.UploadHeader(
        device_id=device_id,
        task_id=update.task_id,
        lease=update.lease,
        blob=messages_pb2.BlobRef(digest=update.blob.digest, size_bytes=update.blob.size_bytes),
        offset=offset,
        report=messages_pb2.UpdateReport.FromString(update.report),
        epoch=update.epoch,
    )


def progress(task_id: str, lease: int, stage: str, done: int, total: int, loss: float | None) -> fleet_pb2.TaskProgress | None:
    """A progress message; None for a stage that the protocol has no word for."""
    word = _STAGES.get(stage)
    if word is None:
        return None
    return fleet_pb2.TaskProgress(task_id=task_id, lease=lease, stage=word, done=max(0, done), total=max(0, total), loss=loss)


def _within(seconds: float, least: float, most: float, unset: float) -> float:
    """The seconds of a message, held within bounds; `unset` where there are none, or NaN."""
    return min(max(seconds, least), most) if seconds and not math.isnan(seconds) else unset


def _blob(message: messages_pb2.BlobRef) -> Blob:
    return Blob(digests.check(message.digest), _size(message))


def _size(message: messages_pb2.BlobRef) -> int:
    if message.size_bytes > INTEGER_MAX:
        raise WireError(f"Blob {message.digest[:12]} has the size {message.size_bytes}; {INTEGER_MAX} is the most.")
    return message.size_bytes


def _base(message: messages_pb2.Base) -> Base:
    if not 0 < len(message.files) <= BASE_FILES_MAX:
        raise WireError(f"Base {message.digest[:12]} lists {len(message.files)} files; 1 to {BASE_FILES_MAX} are allowed.")
    files = tuple(
        basefiles.BaseFile(basefiles.safe_name(file.name), digests.check(file.blob.digest), _size(file.blob)) for file in message.files
    )
    if basefiles.base_digest(files) != digests.check(message.digest):
        raise WireError(f"Base {message.digest[:12]} lists files that do not make up this digest.")
    return Base(message.digest, message.hub_id, message.revision, files)
