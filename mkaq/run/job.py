"""One recipe under way, as its stages see it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from mkaq.checkpoint.output import Output
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.progress import Progress
from mkaq.ranks import Ranks
from mkaq.run.estimate import ModelSize
from mkaq.walk.activations import Activations, Place
from mkaq.walk.device import compute_dtype
from mkaq.walk.walk import LayerWalk

if TYPE_CHECKING:
    from mkaq.stages.base import Mode, Step

RECORD = "record.json"


class Job:
    """One recipe under way.

    Args:
        source: The model that goes in.
        digest: Of its files.
        output: How checkpoints are written.
        seed: Of all that is random.
        device: Where layers run.
        ranks: The processes that share the samples; the first one writes.
        place: Where hidden states lie.
        folder: Where they go if they go to files.

    Attributes:
        model: What the last stage made; the source to begin with.
        last: The name of that stage.
        steps: The records of the stages so far.
        sizes: The source's, and that of each model.
        ran_on: On what each stage that computes has run.
        evaluation: What was measured of each model.
    """

    def __init__(
        self,
        source: Checkpoint,
        digest: str,
        output: Output,
        seed: int,
        device: torch.device,
        ranks: Ranks,
        place: Place,
        folder: Path,
    ) -> None:
        self.source, self.output, self.seed, self.device, self.ranks = source, output, seed, device, ranks
        self._place, self._folder = place, folder
        self.model, self.last = source, "source"
        self.steps: list[Step] = []
        self.sizes = [_size("source", source)]
        self.ran_on: dict[str, dict[str, Any]] = {}
        self.evaluation: dict[str, dict[str, Any]] = {}
        self._digests, self._paths = {"source": digest}, {"source": source.path}

    @property
    def dtype(self) -> torch.dtype:
        """In which dense weights are written."""
        return self.output.dtype

    @property
    def progress(self) -> Progress:
        """Told what happens."""
        return self.output.progress

    def has(self, name: str) -> bool:
        """Whether a stage is published."""
        return name in self._paths

    def publish(self, name: str, path: Path, digest: str) -> None:
        """Notes where a stage is published."""
        self._paths[name], self._digests[name] = path, digest

    def sizes_with(self, after: Checkpoint) -> dict[str, int]:
        """The sizes of the model and of the one that is made of it, as a record has them."""
        before, found = self.sizes[-1], _size("", after)
        return {
            "layers_before": before.layers,
            "layers_after": found.layers,
            "parameters_before": before.parameters,
            "parameters_after": found.parameters,
            "bytes_before": before.bytes,
            "bytes_after": found.bytes,
        }

    def advance(self, name: str, record: "type[Step]", mode: "Mode") -> None:
        """Goes on with what a stage has published, a checkpoint and its record."""
        step = record.model_validate_json((self.path(name) / RECORD).read_bytes())
        self.model, self.last = open_checkpoint(self.path(name), quantized=True), name
        self.steps.append(step)
        self.sizes.append(_size(name, self.model))
        self.note(name, mode)
        for what, how in step.modes().items():
            self.note(what, how)

    def note(self, name: str, mode: "Mode") -> None:
        """Notes on what a computation has run."""
        self.ran_on[name] = self.runs_on(mode)

    def path(self, name: str) -> Path:
        """The folder of a stage."""
        return self._paths[name]

    def digests(self, *names: str) -> dict[str, str]:
        """The digests of stages, by name; `source` is one."""
        return {name: self._digests[name] for name in names}

    def groups(self) -> Sequence[Sequence[int]]:
        """For each layer of the model the layers of the source that it stands for."""
        for step in self.steps:
            if groups := step.groups():
                return groups
        return [[index] for index in range(self.source.num_layers)]

    def tokens(self) -> torch.Tensor:
        """The calibration tokens of all processes, shape (samples, length)."""
        return load_file(self.path("calibrate") / "calibration.safetensors")["input_ids"]

    def walk(
        self,
        model: Checkpoint,
        *,
        fast: bool = False,
        beside: LayerWalk | None = None,
        ranks: Ranks | None = None,
    ) -> LayerWalk:
        """A walk over a checkpoint.

        Args:
            model: The checkpoint.
            fast: It may differ from the model's own forward pass in the last digits.
            beside: A walk that goes beside it, with which it shares the place for hidden states.
            ranks: The processes that walk; all if None.
        """
        dtype = compute_dtype(self.source.dtype, self.device, fast=fast, ranks=self.ranks)
        activations = beside.activations if beside else Activations(self.device, self._place, self._folder)
        walk = LayerWalk(model, self.device, dtype, activations=activations, ranks=ranks or self.ranks)
        if fast:
            walk.use_fast_attention()
        return walk

    def runs_on(self, mode: "Mode") -> dict[str, Any]:
        """What changes the last bits of a stage's computation."""
        cuda = self.device.type == "cuda"
        dtype = compute_dtype(self.source.dtype, self.device, fast=mode.fast, ranks=self.ranks)
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "compute_dtype": str(dtype).removeprefix("torch."),
            "fast_bfloat16": self.ranks.has_fast_bfloat16(self.device),
            "threads": torch.get_num_threads(),
            "processes": 1 if mode.alone else self.ranks.size,
        }


def _size(stage: str, model: Checkpoint) -> ModelSize:
    return ModelSize(stage, model.num_layers, model.parameters, model.nbytes)
