"""Damage at rest: which blobs no longer have their digest, and where whole bytes of them are still to be had.

A damaged update is asked for again, a damaged state or base file is taken from its other place on disk, and a state that is not committed
yet is folded once more; nothing damaged is folded. What is damaged goes to the store's `damaged/`, so that a person can look at it and
nobody else does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fleetune.coordinator.domain import Blob
from fleetune.coordinator.rounds import adapter, needs
from fleetune.coordinator.rounds.needs import JobFacts
from fleetune.coordinator.store.blobs import BlobStore
from fleetune.wire import digests

log = logging.getLogger("fleetune.damage")


@dataclass(frozen=True)
class Standing:
    """What a job stands on, read off its machine on the event loop and looked at on disk by a thread."""

    job_id: str
    running: Mapping[str, Blob]
    """States that a running job computes with and cannot make again."""
    kept: Mapping[str, Blob]
    """States of the rounds it keeps."""
    folders: Mapping[str, tuple[int, ...]]
    """Digest of a state -> the rounds whose folder holds it, too."""
    base_folder: str
    base_files: tuple[tuple[str, Blob], ...]


def standing(job: JobFacts) -> Standing:
    kept = needs.kept_states(job)
    folders: dict[str, tuple[int, ...]] = {}
    for number in sorted(needs.kept_rounds(job)):
        if (entry := job.history.get(number)) is not None and (tensors := entry.published) is not None:
            folders[tensors.digest] = (*folders.get(tensors.digest, ()), number)
    prepared = None if job.ended else job.machine.prepared
    files = tuple((name, Blob(digest, size)) for name, digest, size in prepared.files) if prepared is not None else ()
    fresh = needs.fresh_states(job)
    running = {digest: blob for digest, blob in needs.running_states(job).items() if digest not in fresh}
    return Standing(job.job_id, running, kept, folders, prepared.base_folder if prepared is not None else "", files)


def is_whole(blobs: BlobStore, blob: Blob) -> bool:
    """Whether the blob is there with its size and digest; reads all of it."""
    return has_size(blobs, blob) and blobs.verify(blob.digest)


def has_size(blobs: BlobStore, blob: Blob) -> bool:
    """Whether the blob is there with its size, which costs nothing to know."""
    try:
        return blobs.size(blob.digest) == blob.size_bytes
    except FileNotFoundError:
        return False


def withdrawn(blobs: BlobStore, blob: Blob) -> bool:
    """True where the blob is damaged or missing, and then it is out of the store."""
    if is_whole(blobs, blob):
        return False
    blobs.quarantine(blob.digest)
    return True


def withdrawn_any(blobs: BlobStore, suspects: Iterable[Blob]) -> bool:
    """As `withdrawn`, of several; True where there was one."""
    return sum(withdrawn(blobs, blob) for blob in suspects) > 0  # all of them, not only the first


def ailment(blobs: BlobStore, jobs_folder: Path, job: Standing, *, base_in_full: bool = False) -> str:
    """Mend what can be; a sentence about what the job cannot go on without, or nothing. Blocks on disk.

    States are read in full. Of the base's files, which may be large, only the sizes are looked at unless `base_in_full`; devices check
    what they fetch, and tell.
    """
    for blob in job.running.values():
        if is_whole(blobs, blob):
            continue
        blobs.quarantine(blob.digest)
        if not _state_mended(blobs, jobs_folder, job, blob):
            return f"a state that it computes with (blob {blob.digest[:12]}) is damaged on the coordinator's disk. {_way_out(blobs, job)}"
    for name, blob in job.base_files:
        if is_whole(blobs, blob) if base_in_full else has_size(blobs, blob):
            continue
        blobs.quarantine(blob.digest)
        if not _file_mended(blobs, Path(job.base_folder) / name, blob, link=False):
            return (
                f"the base's file {name} (blob {blob.digest[:12]}) is damaged on the coordinator's disk, and {job.base_folder} does not "
                f"hold it as it was. Put the same base there and submit the job again."
            )
    for blob in job.kept.values():
        if has_size(blobs, blob) or not (blobs.has(blob.digest) or any(place.parent.is_dir() for place in _places(jobs_folder, job, blob))):
            continue  # or it was never kept: `keep_rounds` was smaller once
        if not _state_mended(blobs, jobs_folder, job, blob):
            rounds = ", ".join(str(number) for number in job.folders.get(blob.digest, ()))
            log.error("job=%s the kept state of round %s (blob %s) is damaged", job.job_id, rounds, blob.digest[:12])
    return ""


def _state_mended(blobs: BlobStore, jobs_folder: Path, job: Standing, blob: Blob) -> bool:
    """From the adapter folder of a round that ended with it; no help where both are names of the same damaged bytes."""
    return any(_file_mended(blobs, place, blob, link=True) for place in _places(jobs_folder, job, blob))


def _places(jobs_folder: Path, job: Standing, blob: Blob) -> list[Path]:
    return [adapter.folder(jobs_folder, job.job_id, number) / adapter.STATE_FILE for number in job.folders.get(blob.digest, ())]


def _file_mended(blobs: BlobStore, place: Path, blob: Blob, *, link: bool) -> bool:
    try:
        if digests.of_file(place) != blob.digest:
            return False
    except OSError:  # not there, or not readable: no source
        return False
    blobs.put_file(place, link=link, digest=blob.digest)
    if not is_whole(blobs, blob):
        return False
    blobs.sync()
    log.warning("blob=%s was damaged or missing; restored from %s", blob.digest[:12], place)
    return True


def _way_out(blobs: BlobStore, job: Standing) -> str:
    whole = sorted(number for digest, numbers in job.folders.items() if is_whole(blobs, job.kept[digest]) for number in numbers)
    if not whole:
        return "No kept round of it is whole: restore a backup, or submit the job again."
    export = f"fleetune export {job.job_id} DIR --round {whole[-1]}"
    return f"Round {whole[-1]} is whole: submit a job that begins there (`{export}`, then lora.init_adapter)."
