"""The stages of a run, each one call of `publish`: what it reads, what it writes, what it depends on."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mkaq.calibrate.text import documents, text_digest
from mkaq.calibrate.tokenizer import load_tokenizer
from mkaq.calibrate.tokens import calibration_tokens, evaluation_sequences
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.digests import digest_of
from mkaq.evaluate.perplexity import perplexity
from mkaq.export.artifact import write_artifact
from mkaq.export.record import Published, build_manifest
from mkaq.files import write_json
from mkaq.fit.hold_out import learning_samples
from mkaq.fit.residuals import residuals
from mkaq.heap import return_freed_memory
from mkaq.merge.origins import ORIGINS
from mkaq.merge.stage import merge
from mkaq.peak import peak_bytes, reset_peak
from mkaq.progress import Progress
from mkaq.quantize.bnb_stage import quantize_bitsandbytes
from mkaq.quantize.gptq_stage import quantize_gptq
from mkaq.quantize.joint import JointTarget
from mkaq.ranks import ALONE, Ranks
from mkaq.recipe import BitsandbytesSection, GptqSection, MergeSection, Recipe
from mkaq.recover.layerwise import recover
from mkaq.run.plan import RunPlan, StageSize, output_dtype
from mkaq.run.publish import Handoff, find_published, fingerprint_of, publish
from mkaq.run.result import RunResult
from mkaq.units import parse_size
from mkaq.walk.activations import Activations
from mkaq.walk.device import compute_dtype
from mkaq.walk.walk import LayerWalk


class Stages:
    """One run under way.

    Args:
        recipe: What to do.
        folder: Of the run.
        device: Where layers run.
        progress: Told what happens.
        fresh: Make every stage again.
        source: The model that goes in.
        source_files: Path, bytes and sha256 of its files.
        plan: Its sizes.
        ranks: The processes that share the samples; the first one writes.

    Attributes:
        budget: What the search for a budget tried and chose, for the manifest.
        ran_on: On what each stage ran, for the manifest.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        device: torch.device,
        progress: Progress,
        fresh: bool,
        source: Checkpoint,
        source_files: list[dict[str, Any]],
        plan: RunPlan,
        ranks: Ranks,
    ) -> None:
        self.recipe, self.folder, self.device, self.progress, self.fresh = (
            recipe,
            folder,
            device,
            progress,
            fresh,
        )
        self.source, self.plan, self.ranks = source, plan, ranks
        self.result = RunResult(folder, [plan.sizes[0]])
        self._dtype = output_dtype(recipe, source)
        self.log: list[dict[str, Any]] = []
        self.budget: dict[str, Any] | None = None
        self.ran_on: dict[str, dict[str, Any]] = {}
        self._source_files = source_files
        self._digests = {"source": digest_of(self._source_files)}

    def write_recipe(self) -> None:
        """recipe.yaml: the resolved recipe."""
        if self.ranks.main:
            (self.folder / "recipe.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")

    def key(self) -> str:
        """One digest of all that the models of this recipe and what is measured on them depend on."""
        made = [stage for stage in ("merge", "recover", "quantize") if getattr(self.recipe, stage)]
        inputs = {**self._inputs("source"), "text": text_digest(self.recipe.calibration)}
        settings = {"calibrate": self.recipe.calibration.model_dump(mode="json")}
        settings |= {stage: self._settings(stage) for stage in made}
        if section := self.recipe.evaluate and self.recipe.evaluate.perplexity:
            inputs["evaluation"] = text_digest(section)
            settings["evaluate"] = self._settings("evaluate")
        return digest_of([fingerprint_of(stage, each, inputs) for stage, each in settings.items()])

    def calibrate(self) -> None:
        """Chooses the calibration tokens."""
        section = self.recipe.calibration

        def build(folder: Path) -> None:
            texts = documents(section, "calibrate")
            count, length = section.num_samples, section.max_seq_length
            tokens = calibration_tokens(texts, load_tokenizer(self.source.path), count, length, section.seed)
            save_file({"input_ids": tokens}, folder / "calibration.safetensors")

        self._publish(
            "calibrate",
            section.model_dump(mode="json"),
            {**self._inputs("source"), "text": text_digest(section)},
            build,
            alone=True,
        )

    def merge(self) -> Checkpoint:
        """Merges layers of the source."""
        section, seed = self.recipe.merge, self.recipe.calibration.seed
        assert section is not None

        def build(folder: Path) -> dict[str, str]:
            walk = self._walk(self.source, fast=self._is_fast("merge"))
            return merge(self.source, self._tokens(), section, seed, folder, walk=walk, **self._output())

        inputs = self._inputs("source", "calibrate")
        return self._checkpoint(self._publish("merge", self._settings("merge"), inputs, build))

    def recover(self, model: Checkpoint) -> Checkpoint:
        """Tunes the merged model, layer by layer."""
        section, seed = self.recipe.recover, self.recipe.calibration.seed
        assert section is not None

        def build(folder: Path) -> None:
            samples = learning_samples(self.ranks, self._tokens(), seed)
            source = self._walk(self.source)
            walk = self._walk(model, beside=source)
            recover(source, walk, self._groups(), samples, section, seed, folder, **self._output())

        inputs = self._inputs("source", "calibrate", "merge")
        return self._checkpoint(self._publish("recover", self._settings("recover"), inputs, build))

    def quantize(self, model: Checkpoint) -> Checkpoint:
        """Quantizes the merged model, or the source."""
        section = self.recipe.quantize
        assert section is not None
        fused = self.recipe.merge is not None and self.recipe.merge.fuse == "channels"
        solved = isinstance(section, GptqSection) and section.target == "source"
        measured = fused or solved or self.recipe.recover is not None

        def build(folder: Path) -> None:
            told = self._quantize(section, model, folder)
            if self.ranks.main:
                told["residuals"] = self._residuals(folder) if measured else None
            write_json(folder / "quantization.json", told)

        inputs = self._inputs(self._last("quantize"))
        if self.recipe.needs_calibration:
            inputs |= self._inputs("source", "calibrate")
        alone = isinstance(section, BitsandbytesSection)
        done = self._publish("quantize", self._settings("quantize"), inputs, build, alone=alone)
        if measured:
            self.ran_on["residuals"] = self._runs_on("residuals")
        return self._checkpoint(done)

    def _quantize(
        self, section: GptqSection | BitsandbytesSection, model: Checkpoint, folder: Path
    ) -> dict[str, Any]:
        """Writes the quantized checkpoint; returns what quantization.json says of it."""
        if isinstance(section, BitsandbytesSection):
            done = quantize_bitsandbytes(model, section, folder, device=self.device, **self._output())
            return {"modules": [asdict(module) for module in done]}
        tokens, target = self._tokens(), None
        if section.target == "source":
            samples = learning_samples(self.ranks, tokens, self.recipe.calibration.seed)
            tokens, target = samples.tokens, JointTarget(self._walk(self.source), self._groups(), samples)
        else:
            tokens = tokens[self.ranks.share(len(tokens))]
        walk = self._walk(model, fast=self._is_fast("quantize"), beside=target.source if target else None)
        output = self._output()
        return asdict(quantize_gptq(model, tokens, section, folder, walk=walk, target=target, **output))

    def _residuals(self, folder: Path) -> list[float]:
        """How far each quantized layer is from the source, where weights do not follow from the source."""
        samples = learning_samples(ALONE, self._tokens(), self.recipe.calibration.seed)
        source = self._walk(self.source, ranks=ALONE)
        made = self._walk(open_checkpoint(folder, quantized=True), beside=source, ranks=ALONE)
        return residuals(source, made, self._groups(), samples.held()).layers

    def evaluate(self, stage: str, model: Checkpoint) -> None:
        """Notes the size of a stage's model and, where the recipe asks for it, measures it."""
        if stage != "source":
            parameters = next(size.parameters for size in self.plan.sizes if size.stage == stage)
            self.result.sizes.append(StageSize(stage, model.num_layers, parameters, model.nbytes))
        section = self.recipe.evaluate.perplexity if self.recipe.evaluate else None
        if section is None:
            return
        settings = section.model_dump(mode="json")

        def build(folder: Path) -> None:
            tokenizer = load_tokenizer(self.source.path)
            texts = documents(section, "evaluate")
            sequences = evaluation_sequences(texts, tokenizer, section.max_seq_length, section.num_samples)
            measured = perplexity(self._walk(model), sequences, self.progress, f"perplexity of {stage}")
            write_json(
                folder / "evaluation.json", {"perplexity": {**measured.as_json(), "settings": settings}}
            )

        inputs = {**self._inputs(stage), "text": text_digest(section)}
        done = self._publish(f"evaluate/{stage}", self._settings("evaluate"), inputs, build)
        self.result.evaluation[stage] = json.loads((done.path / "evaluation.json").read_text())

    def export(self, model: Checkpoint) -> None:
        """Writes the artifact."""
        tokens = self._tokens() if self.recipe.needs_calibration else None
        published = Published(
            self.folder,
            self.result.sizes,
            self._source_files,
            tokens,
            self.result.evaluation,
            self.budget,
            self.ran_on,
        )
        manifest = build_manifest(self.recipe, self.source, published, self._dtype)
        inputs = self._inputs(self._last("export"))
        settings = manifest.model_dump(mode="json", by_alias=True)
        fused = self.recipe.merge is not None and self.recipe.merge.fuse == "channels"
        origins = self.folder / "merge" / ORIGINS if fused else None

        def build(folder: Path) -> dict[str, str]:
            return write_artifact(model, manifest, folder, origins)

        done = self._publish("artifact", settings, inputs, build, inside=False, alone=True)
        self.result.artifact = done.path

    def write_log(self) -> None:
        """run.json: clocks and memory, which no digest covers."""
        peak = max((stage["peak_memory_bytes"] for stage in self.log), default=0)
        log: dict[str, Any] = {
            "processes": self.ranks.size,
            "stages": self.log,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
        }
        log |= {"peak_memory_bytes": peak, "expected_memory_bytes": self.plan.memory_bytes}
        log["expected_memory_by_stage"] = dict(self.plan.memory)
        if self.device.type == "cuda":
            log["peak_device_memory_bytes"] = max(row.get("peak_device_bytes", 0) for row in self.log)
        write_json(self.folder / "run.json", log)

    def _publish(
        self,
        stage: str,
        section: Any,
        inputs: dict[str, str],
        build: Callable[[Path], Mapping[str, str] | None],
        *,
        inside: bool = True,
        alone: bool = False,
    ) -> Handoff:
        """Makes a stage, or finds it made; unless the first process does it `alone`, all of them build."""
        began, folder = time.time(), self.folder / stage
        return_freed_memory()  # what the stage before has let go of is not this one's
        reset_peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if self.ranks.main:

            def call_all(scratch: Path) -> Mapping[str, str] | None:
                self.ranks.tell(not alone)
                return build(scratch)

            done = publish(
                folder,
                stage,
                section,
                inputs,
                call_all,
                fresh=self.fresh,
                inside=inside,
                say=self.progress.say,
            )
            if done.reused:
                self.ranks.tell(False)
            self.ranks.tell([done.fingerprint, done.digest])
        else:
            if self.ranks.tell():
                with TemporaryDirectory() as scratch:
                    build(Path(scratch))
            done = find_published(folder, self.ranks.tell(), inside=inside)
        seconds = time.time() - began
        self.progress.say(f"{stage}: " + ("unchanged, kept" if done.reused else f"done in {seconds:.1f} s"))
        row: dict[str, Any] = {"stage": stage, "started": began, "seconds": seconds, "reused": done.reused}
        if self.device.type == "cuda":
            row["peak_device_bytes"] = torch.cuda.max_memory_allocated(self.device)
        self.log.append(row | {"peak_memory_bytes": peak_bytes()})
        if stage not in ("calibrate", "artifact"):
            self.ran_on[stage] = self._runs_on(stage.partition("/")[0])
        self._digests[stage] = done.digest
        return done

    def _inputs(self, *names: str) -> dict[str, str]:
        return {name: self._digests[name] for name in names}

    def _last(self, before: str) -> str:
        """The stage whose model `before` reads."""
        made = {name: getattr(self.recipe, name) for name in ("merge", "recover", "quantize")}
        done = [name for name, section in made.items() if section is not None and name != before]
        return done[-1] if done else "source"

    def _groups(self) -> list[list[int]]:
        """For each layer of the model to quantize the layers of the source that it stands for."""
        if self.recipe.merge is None:
            return [[index] for index in range(self.source.num_layers)]
        plan = json.loads((self.folder / "merge" / "merge_plan.json").read_text())
        return [sorted(map(int, layer["from"])) for layer in plan["layers"]]

    def _tokens(self) -> torch.Tensor:
        return load_file(self.folder / "calibrate" / "calibration.safetensors")["input_ids"]

    def _walk(
        self,
        model: Checkpoint,
        *,
        fast: bool = False,
        beside: LayerWalk | None = None,
        ranks: Ranks | None = None,
    ) -> LayerWalk:
        """A walk over a checkpoint; one that goes beside another shares its place for hidden states."""
        dtype = compute_dtype(self.source.dtype, self.device, fast=fast, ranks=self.ranks)
        activations = beside.activations if beside else Activations(self.device, self.plan.place, self.folder)
        walk = LayerWalk(model, self.device, dtype, activations=activations, ranks=ranks or self.ranks)
        if fast:
            walk.use_fast_attention()
        return walk

    def _is_fast(self, stage: str) -> bool:
        """Whether a stage's walk may differ in the last digits from the model's own forward pass."""
        section = getattr(self.recipe, stage, None)
        if isinstance(section, MergeSection):
            return section.fuse == "average"
        return isinstance(section, GptqSection) and section.target == "input"

    def _checkpoint(self, done: Handoff) -> Checkpoint:
        return open_checkpoint(done.path, quantized=True)

    def _output(self) -> dict[str, Any]:
        return {
            "dtype": self._dtype,
            "shard_size": parse_size(self.recipe.export.shard_size),
            "progress": self.progress,
        }

    def _settings(self, stage: str) -> dict[str, Any]:
        """Of a stage that computes: its part of the recipe, its files, and on what it runs."""
        if stage == "evaluate":
            assert self.recipe.evaluate is not None and self.recipe.evaluate.perplexity is not None
            return {**self.recipe.evaluate.perplexity.model_dump(mode="json"), **self._runs_on(stage)}
        section = getattr(self.recipe, stage).model_dump(mode="json")
        files = {"dtype": str(self._dtype), "shard_size": self.recipe.export.shard_size}
        return {**section, "seed": self.recipe.calibration.seed, **files, "ran_on": self._runs_on(stage)}

    def _runs_on(self, stage: str) -> dict[str, Any]:
        """What changes the last bits of a stage's computation."""
        cuda = self.device.type == "cuda"
        alone = stage == "residuals"
        alone |= stage == "quantize" and isinstance(self.recipe.quantize, BitsandbytesSection)
        dtype = compute_dtype(self.source.dtype, self.device, fast=self._is_fast(stage), ranks=self.ranks)
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "compute_dtype": str(dtype).removeprefix("torch."),
            "fast_bfloat16": self.ranks.has_fast_bfloat16(self.device),
            "threads": torch.get_num_threads(),
            "processes": 1 if alone else self.ranks.size,
        }
