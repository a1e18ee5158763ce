"""The state of a recipe in progress, as its stages see it."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from mkaq.checkpoint.finished import Finished
from mkaq.checkpoint.output import Output
from mkaq.checkpoint.reader import Checkpoint
from mkaq.checkpoint.validate import open_checkpoint
from mkaq.progress import Progress
from mkaq.ranks import Ranks
from mkaq.run.estimate import ModelSize
from mkaq.run.publish import finished_beside
from mkaq.walk.activations import Activations, Place
from mkaq.walk.device import compute_dtype
from mkaq.walk.walk import LayerWalk

if TYPE_CHECKING:
    from mkaq.stages.base import Mode, Step

RECORD = "record.json"
TOKENS = "calibration.safetensors"


class Job:
    """A recipe in progress.

    Args:
        source: The model to compress.
        digest: Digest of its files.
        output: How checkpoints are written.
        seed: Seed of everything random.
        device: Where layers run.
        ranks: The processes that share the samples; the first one writes.
        place: Where hidden states are stored.
        folder: Folder of hidden states stored in files.
        long: The stages that take so long that they keep each layer that they finish.

    Attributes:
        model: The model made by the last stage; at first the source.
        last: The name of that stage.
        steps: The records of the stages so far.
        sizes: The sizes of the source and of each model.
        ran_on: The environment of each stage that computes.
        evaluation: The measurements of each model.
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
        long: Collection[str] = (),
    ) -> None:
        self.source, self.output, self.seed, self.device, self.ranks = source, output, seed, device, ranks
        self._place, self._folder, self._long = place, folder, long
        self.model, self.last = source, "source"
        self.steps: list[Step] = []
        self.sizes = [_size("source", source)]
        self.ran_on: dict[str, dict[str, Any]] = {}
        self.evaluation: dict[str, dict[str, Any]] = {}
        self._digests, self._paths = {"source": digest}, {"source": source.path}

    @property
    def dtype(self) -> torch.dtype:
        """Type of dense weights on disk."""
        return self.output.dtype

    @property
    def fits(self) -> bool:
        """Whether hidden states, and all that lies with them, fit on the device."""
        return self._place == "device"

    @property
    def progress(self) -> Progress:
        """Progress output."""
        return self.output.progress

    def finished(self, stage: str, scratch: Path) -> Finished:
        """The layers of a stage that were finished before it was stopped, if it keeps them or has kept some.

        Args:
            stage: Its name.
            scratch: The folder in which it is built.
        """
        place = finished_beside(scratch)
        return Finished(place if stage in self._long or place.is_dir() else None, self.ranks)

    def has(self, name: str) -> bool:
        """Whether a stage is published."""
        return name in self._paths

    def publish(self, name: str, path: Path, digest: str) -> None:
        """Notes the folder and the digest of a published stage."""
        self._paths[name], self._digests[name] = path, digest

    def sizes_with(self, after: Checkpoint) -> dict[str, int]:
        """The size fields of a record: the current model's, and those of the model made from it."""
        old, new = self.sizes[-1], _size("", after)
        return {
            "layers_before": old.layers,
            "layers_after": new.layers,
            "parameters_before": old.parameters,
            "parameters_after": new.parameters,
            "bytes_before": old.bytes,
            "bytes_after": new.bytes,
        }

    def advance(self, name: str, record: "type[Step]", mode: "Mode", how: str) -> None:
        """Makes a stage's published checkpoint the current model, and adds its record."""
        step = record.model_validate_json((self.path(name) / RECORD).read_bytes())
        self.model, self.last = open_checkpoint(self.path(name), quantized=True), name
        self.steps.append(step)
        self.sizes.append(_size(name, self.model, how))
        self.note(name, mode)
        for computation, its_mode in step.modes().items():
            self.note(computation, its_mode)

    def note(self, name: str, mode: "Mode") -> None:
        """Notes the environment of a computation."""
        self.ran_on[name] = self.runs_on(mode)

    def path(self, name: str) -> Path:
        """The folder of a stage."""
        return self._paths[name]

    def digests(self, *names: str) -> dict[str, str]:
        """The digests of stages, by name; `source` is one."""
        return {name: self._digests[name] for name in names}

    def groups(self) -> Sequence[Sequence[int]]:
        """For each layer of the model, the source layers that it replaces."""
        for step in self.steps:
            if groups := step.groups():
                return groups
        return [[index] for index in range(self.source.num_layers)]

    def tokens(self) -> torch.Tensor:
        """The calibration tokens of all processes, shape (samples, length)."""
        return load_file(self.path("calibrate") / TOKENS)["input_ids"]

    def walk(
        self,
        model: Checkpoint,
        *,
        fast: bool = False,
        beside: LayerWalk | None = None,
        ranks: Ranks | None = None,
        dtype: torch.dtype | None = None,
    ) -> LayerWalk:
        """A walk over a checkpoint.

        Args:
            model: The checkpoint.
            fast: The result may differ from the model's own forward pass in the last digits.
            beside: A walk run in parallel, whose storage of hidden states is shared.
            ranks: The processes that walk; all if None.
            dtype: Type of weights and hidden states; None for that of such a walk on this device.
        """
        dtype = dtype or compute_dtype(self.source.dtype, self.device, fast=fast, ranks=self.ranks)
        activations = beside.activations if beside else Activations(self.device, self._place, self._folder)
        walk = LayerWalk(model, self.device, dtype, activations=activations, ranks=ranks or self.ranks)
        if fast:
            walk.use_fast_attention()
        return walk

    def runs_on(self, mode: "Mode") -> dict[str, Any]:
        """The environment of a computation: everything that changes its last bits."""
        cuda = self.device.type == "cuda"
        usual = compute_dtype(self.source.dtype, self.device, fast=mode.fast, ranks=self.ranks)
        dtype = torch.float32 if mode.float32 else usual
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "compute_dtype": str(dtype).removeprefix("torch."),
            "fast_bfloat16": self.ranks.has_fast_bfloat16(self.device),
            "threads": torch.get_num_threads(),
            "processes": 1 if mode.alone else self.ranks.size,
        }


def _size(stage: str, model: Checkpoint, how: str = "") -> ModelSize:
    return ModelSize(stage, model.num_layers, model.parameters, model.nbytes, how)
