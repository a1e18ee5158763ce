"""Making stages: each is found by its fingerprint, or run by all processes and published by the first."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from mkaq.checkpoint.validate import open_checkpoint
from mkaq.files import write_json
from mkaq.heap import return_freed_memory
from mkaq.peak import peak_bytes, reset_peak
from mkaq.progress import Progress
from mkaq.ranks import Ranks
from mkaq.run.job import RECORD, Job
from mkaq.run.log import making_times
from mkaq.run.provenance import Provenance, provenance_of, reason
from mkaq.run.publish import ARTIFACT, Handoff, find_published, handoff_place, publish, read_provenances
from mkaq.run.schedule import Schedule
from mkaq.run.store import Store

if TYPE_CHECKING:
    from mkaq.stages.base import ModelStage, Section, Stage

Build = Callable[[Path], Mapping[str, str]]
"""Writes files into a folder; returns the sha256 of those that it has hashed."""


class Maker:
    """Makes the stages of a run's jobs.

    Args:
        folder: The run's folder.
        device: Where layers run.
        progress: Progress output.
        fresh: Make every stage again, once.
        ranks: The processes; the first one writes.
        schedule: Told when stages begin and end.
        explain: Say why a stage is made.

    Attributes:
        log: For each stage made, its time and peak memory.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        progress: Progress,
        fresh: bool,
        ranks: Ranks,
        schedule: Schedule,
        explain: bool = False,
    ) -> None:
        self._folder, self._device, self._progress, self._ranks = folder, device, progress, ranks
        self._schedule, self._explain = schedule, explain
        self._fresh, self._store = fresh, Store(folder, fresh, progress.say)
        self.log: list[dict[str, Any]] = []
        self._took = making_times(folder)

    def begin(self) -> None:
        """Removes the links of earlier jobs; call it before the job whose stages the run's folder shows."""
        self._store.unlink()

    def make_model(self, stage: "ModelStage", section: "Section", job: Job) -> None:
        """Makes the next model of a job."""
        mode = stage.mode(section)

        def build(scratch: Path) -> Mapping[str, str]:
            facts, digests = stage.run(section, job, scratch)
            if self._ranks.is_main:
                settings = {"settings": section.model_dump(mode="json")}
                after = open_checkpoint(scratch, quantized=True)
                record = stage.Record.model_validate({**job.sizes_with(after), **settings, **facts})
                write_json(scratch / RECORD, record.model_dump(mode="json", by_alias=True))
            return digests

        self._make(stage, stage.NAME, section, job, build)
        job.advance(stage.NAME, stage.Record, mode, section.how())

    def make(self, stage: "Stage", section: "Section", job: Job, of: str = "") -> str:
        """Makes a stage that makes no model, for the job or for one of its models; returns its name."""
        name = f"{stage.NAME}/{of}" if of else stage.NAME
        self._make(stage, name, section, job, lambda scratch: stage.run(section, job, scratch).digests)
        return name

    def publish_artifact(self, settings: Any, inputs: Mapping[str, str], build: Build) -> Path:
        """Publishes the artifact, outside the store."""
        folder = self._folder / ARTIFACT
        provenance = provenance_of("artifact", settings, inputs)
        stored = partial(read_provenances, [handoff_place(folder, inside=False)])

        def make(build: Build) -> Handoff:
            options = {"fresh": self._fresh, "inside": False}
            return publish(folder, provenance, build, say=self._progress.say, **options)

        self._together(
            "artifact",
            self._explained("artifact", provenance, stored, build),
            make,
            lambda claim: find_published(folder, claim, inside=False),
            alone=True,
        )
        return folder

    def _make(self, stage: "Stage", name: str, section: "Section", job: Job, build: Build) -> None:
        mode, settings = stage.mode(section), section.model_dump(mode="json")
        if not mode.plain:
            written = {"dtype": str(job.dtype), "shard_size": job.output.shard_size}
            settings |= {"seed": job.seed, **written, "ran_on": job.runs_on(mode)}
        provenance = provenance_of(stage.NAME, settings, stage.inputs(section, job))

        def make(build: Build) -> Handoff:
            done = self._store.publish(provenance, build)
            self._store.link(name, done)
            return done

        done = self._together(
            name,
            self._explained(name, provenance, partial(self._store.stored, stage.NAME), build),
            make,
            lambda claim: self._store.find(stage.NAME, claim),
            alone=mode.alone,
        )
        job.publish(name, done.path, done.digest)

    def _explained(
        self, name: str, new: Provenance, stored: Callable[[], list[Provenance | None]], build: Build
    ) -> Build:
        """The build, which says first why it is run, if this was asked for."""
        if not self._explain or not self._ranks.is_main:
            return build

        def build_and_say(scratch: Path) -> Mapping[str, str]:
            why = "--fresh makes every stage again" if self._fresh else reason(new, stored())
            self._progress.say(f"{name}: made, since {why}")
            return build(scratch)

        return build_and_say

    def _together(
        self,
        name: str,
        build: Build,
        publish: Callable[[Build], Handoff],
        find: Callable[[list[str]], Handoff],
        *,
        alone: bool,
    ) -> Handoff:
        """Publishes in the first process; all processes build, unless `alone`.

        Args:
            name: Name of the stage.
            build: Makes the stage.
            publish: Makes or finds the stage, in the first process.
            find: Finds the stage that the first process has published, by fingerprint and digest.
            alone: Whether only the first process builds.
        """
        began, stage = time.time(), name.partition("/")[0]
        self._schedule.begin(stage, again=stage != name)
        return_freed_memory()  # memory freed by the stage before must not count
        reset_peak()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._ranks.is_main:

            def build_with_others(scratch: Path) -> Mapping[str, str]:
                self._ranks.broadcast(not alone)
                return build(scratch)

            done = publish(build_with_others)
            if done.reused:
                self._ranks.broadcast(False)
            self._ranks.broadcast([done.fingerprint, done.digest])
        else:
            if self._ranks.broadcast():
                with TemporaryDirectory() as scratch:
                    build(Path(scratch))
            done = find(self._ranks.broadcast())
        seconds = time.time() - began
        self._schedule.finish()
        self._progress.say(f"{name}: " + ("unchanged, kept" if done.reused else f"done in {seconds:.1f} s"))
        if not done.reused:
            self._took[done.fingerprint] = seconds
        row: dict[str, Any] = {
            "stage": name,
            "fingerprint": done.fingerprint,
            "started": began,
            "seconds": seconds,
            "reused": done.reused,
            "made_seconds": self._took.get(done.fingerprint),
        }
        if self._device.type == "cuda":
            row["peak_device_bytes"] = torch.cuda.max_memory_allocated(self._device)
        self.log.append(row | {"peak_memory_bytes": peak_bytes()})
        return done
