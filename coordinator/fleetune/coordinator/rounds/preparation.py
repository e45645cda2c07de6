"""Before the first round: the initial global state and the base's files, made by the method or the model host, in the store."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fleetune.coordinator.domain import Blob, Prepared
from fleetune.coordinator.jobrules import is_folder
from fleetune.coordinator.rounds import adapter, damage, layouts, machine
from fleetune.coordinator.rounds.host import HostError, encode
from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.rounds.means import Means, expanded, failure_of
from fleetune.errors import DurabilityError, FleetuneError, ModelError


class Preparation:
    def __init__(self, means: Means) -> None:
        self._means = means

    async def prepare(self, job: LiveJob) -> None:
        """Make what the first round begins with, and hand it in."""
        async with contextlib.AsyncExitStack() as kept:
            try:
                prepared = await self._prepared(job, kept)
            except HostError as error:
                self._means.post(job.job_id, machine.HostFailed("preparing", error.failure))
            except DurabilityError as error:
                self._means.give_up(error)
            except (FleetuneError, OSError) as error:
                self._means.post(job.job_id, machine.HostFailed("preparing", failure_of(error, "prepare")))
            else:
                await self._means.ask(job.job_id, machine.PreparedEvent(prepared))

    async def _prepared(self, job: LiveJob, kept: contextlib.AsyncExitStack) -> Prepared:
        """The first global state, its blobs stored and kept until `kept` is closed."""
        spec = job.spec
        folder = self._means.scratch / f"prepare-{uuid.uuid4().hex}"
        folder.mkdir()
        try:
            if not job.method.needs_model:
                path = folder / adapter.STATE_FILE
                initial = await self._means.disk.run(job.method.initial, spec, path)
                await kept.enter_async_context(self._means.retention.keeping(initial.state.digest))
                await self._means.disk.run(self._means.blobs.put_file, path, link=True, digest=initial.state.digest)
                return Prepared(initial.state, initial.trainables_digest)
            init = spec.lora.init_adapter
            if init in self._means.jobs:
                init = str(await self._means.disk.run(self._own_adapter, self._means.jobs[init], folder))
            request = {
                "base": str(expanded(spec.model.base)) if is_folder(spec.model.base) else spec.model.base,
                "revision": spec.model.revision,
                "allow_hub": spec.model.allow_hub,
                "recipe": encode(job.recipe),
                "seed": spec.seed,
                "init_adapter": str(expanded(init)) if init else None,
                "triplets": job.machine.plan.ranking is not None,
                "out_folder": str(folder),
            }

            def on_event(event: Mapping[str, object]) -> None:
                if event.get("event") == "progress":
                    job.host_stage = str(event.get("stage", ""))
                    job.touch()

            prepared, out = await self._means.host.prepare(request, on_event)
            await kept.enter_async_context(self._means.retention.keeping(prepared.state.digest))
            await self._means.disk.run(self._means.blobs.put_file, out / adapter.STATE_FILE, link=True, digest=prepared.state.digest)
            for name, digest, size_bytes in prepared.files:
                await kept.enter_async_context(self._means.retention.keeping(digest))
                if not await self._means.disk.run(damage.is_whole, self._means.blobs, Blob(digest, size_bytes)):
                    await self._means.disk.run(self._means.blobs.put_file, Path(prepared.base_folder) / name, link=False, digest=digest)
            if job.method.prunes:  # told now, not when the first device has trained
                await self._means.disk.run(layouts.of_job, self._means.blobs, prepared, spec.lora.targets)
            if spec.evaluation.source != "heldout":
                return prepared
            job.host_stage = "evaluating the base"
            job.touch()
            heldout = expanded(spec.evaluation.heldout)
            state = self._means.blobs.path(prepared.state.digest)
            of_triplets = job.machine.plan.ranking is not None
            measured = await self._means.host.evaluate(prepared.base_folder, job.recipe, state, heldout, triplets=of_triplets)
            return replace(prepared, initial=measured)
        finally:
            job.host_stage = ""
            await self._means.disk.run(shutil.rmtree, folder, ignore_errors=True)
            if spec.evaluation.source != "heldout":
                self._means.host.rest()

    def _own_adapter(self, source: LiveJob, folder: Path) -> Path:
        """A job's last adapter in a folder that nobody else clears up."""
        prepared = source.machine.prepared
        last = source.history.last
        if last is None or prepared is None or not prepared.adapter_config:
            raise ModelError(f"job {source.job_id} has no adapter to start from.", "Name a job with a committed round, or a folder.")
        state = last.state
        if state is None or not damage.is_whole(self._means.blobs, state):
            raise ModelError(f"the last adapter of job {source.job_id} is damaged on disk.", "Name a folder with a whole one.")
        return adapter.write(folder / "init", self._means.blobs, adapter.Adapter(source.job_id, source.spec, prepared, last))
