"""What each stage computes, counted from headers: tokens through layers, products, weights, bytes."""

from collections.abc import Iterable, Sequence

from mkaq.distill.course import CHECKS as DISTILL_CHECKS
from mkaq.fit.hold_out import HELD_OUT, held_out_samples
from mkaq.fit.ridge import RIDGES, TARGETS
from mkaq.merge.cost import COEFFICIENTS, built_on, probe_count
from mkaq.merge.solve import CANDIDATES
from mkaq.recover.ending import CHECKS, STEP, STEPS
from mkaq.recover.ending import HELD_OUT as ENDING_HELD_OUT
from mkaq.run.estimate import Task, Work


def walking(task: Task, layers: int, tokens: float, *, fast: bool = False) -> Work:
    """One pass over so many layers."""
    return Work(fast=layers * tokens) if fast else Work(exact=layers * tokens)


def comparing(task: Task, points: int, *, fast: bool) -> Work:
    """Hidden states at so many points, and a diffusion map of each layer (its products in float64)."""
    layers, samples = task.source.num_layers, min(task.samples, points) / task.processes
    maps = 2.0 * layers * points**2 * (2 * task.source.sizes.hidden + 500)
    return walking(task, layers, samples * task.length, fast=fast) + Work(products=maps)


def fusing(task: Task, layers: int) -> Work:
    """All layers of the source, made so many: those that are merged in groups of about one size."""
    return _sum(_fused(task, group, task.own * task.length) for group in _groups(task, layers))


def _fused(task: Task, group: int, tokens: float) -> Work:
    """A group of layers made one: three runs of its parts, moments, selection, ridges."""
    source, sizes = task.source, task.source.sizes
    shapes = {linear: source.linear_shape(linear) for linear in source.arch.linear_names}
    writers = [shapes[name] for name in source.arch.out_projs]
    share = sum(rows * columns for rows, columns in writers) / _weights(task)
    work = walking(task, 1, tokens * (2 * group + 1 - group * share))
    widths = writers[0][1], sizes.intermediate  # of heads and channels
    candidates = group * widths[0], widths[1] if group == 1 else int(CANDIDATES * widths[1])
    for width, columns in zip(widths, candidates, strict=True):
        work += _moments(tokens, columns, sizes.hidden)
        work += _ridges(width, sizes.hidden)
        if group > 1:
            work += _moments(tokens / HELD_OUT, width, sizes.hidden) + Work(
                products=1.3 * columns**3 + 2.0 * columns**2 * (columns - width + sizes.hidden),
                factors=columns**3 / 3,
            )
    return work


def _moments(tokens: float, features: int, targets: int) -> Work:
    """X^T X, its upper triangle in stripes, and X^T Y; a fifth more for the weights of the tokens."""
    return Work(products=1.2 * tokens * (9 / 8 * features**2 + 2 * features * targets))


def _ridges(features: int, targets: int) -> Work:
    """A weight solved with each ridge for some of its targets, and with one for all."""
    solved = len(RIDGES) * min(targets, TARGETS) + 1.5 * targets
    return Work(products=6.0 * features**2 * solved, factors=(len(RIDGES) + 1) * features**3 / 3)


def averaged(task: Task, layers: int) -> Work:
    """All layers of the source, made so many, with measured coefficients."""
    return _averaged(task, _groups(task, layers), task.own * task.length, len(COEFFICIENTS))


def _averaged(task: Task, groups: Sequence[int], tokens: float, tried: int) -> Work:
    """Groups of so many layers averaged with each of some coefficients, and their outputs compared."""
    each = _weights(task)
    passes = sum(group + (tried if group > 1 else 1) for group in groups)
    sums = sum(3.0 * group * each * tried for group in groups if group > 1)
    return walking(task, passes, tokens, fast=True) + Work(products=30 * sums)


def trying(task: Task, candidates: Sequence[tuple[int, int]], *, fuse: bool, measured: bool) -> Work:
    """Candidate groups, each built from a part of the tokens and measured on others."""
    if not candidates:
        return Work()
    layers = task.source.num_layers
    sample, probes = trial_tokens(task, len(candidates))
    built = (
        _sum(_fused(task, length, sample) for _, length in candidates)
        if fuse
        else _averaged(task, [n for _, n in candidates], sample, len(COEFFICIENTS) if measured else 1)
    )
    passes = layers * (sample + probes) + sum(probes * (layers - n - start + 1) for start, n in candidates)
    return built + walking(task, 1, passes, fast=not fuse) + Work(logits=(len(candidates) + 1) * probes)


def trial_tokens(task: Task, candidates: int) -> tuple[int, int]:
    """Tokens of one process that build candidates, and those that measure them, phrases included."""
    built = built_on(task.samples, candidates, task.processes)
    probed = 2 * probe_count(task.samples, candidates)
    return -(-built // task.processes) * task.length, -(-probed // task.processes) * task.length


def tuning(task: Task, layers: int, steps: int, batch_size: int) -> Work:
    """Steps of an optimizer in every layer, forward and backward, and errors on held-out samples."""
    held = held_out_samples(task.samples)
    batch = min(batch_size, max(1, task.samples - held)) / task.processes
    exact = task.source.num_layers * task.own + layers * (task.own + 6 * held / task.processes)
    learned, watched = (n * task.length / task.processes for n in (task.samples - held, held))
    end = min(steps, STEPS) * min(STEP / task.processes, learned)
    watched = min(ENDING_HELD_OUT / task.processes, watched)
    return Work(
        logits=3 * end + 2 * (CHECKS + 1) * watched,  # two heads, and a gradient
        tuned=layers * steps * batch * task.length + end,
        stepped=1.0 * layers * steps * _weights(task),
        exact=exact * task.length,
    )


def distilling(task: Task, layers: int, steps: int, tokens: float, held_out: int, trained: float) -> Work:
    """Steps forward and backward through all layers, and measurements on held-out tokens.

    Args:
        task: The task.
        layers: Layers of the model.
        steps: Optimizer steps.
        tokens: Tokens of a step of all processes.
        held_out: Held-out tokens of all processes.
        trained: Trained weights of a layer.
    """
    learned, watched = steps * tokens / task.processes, (DISTILL_CHECKS + 1) * held_out / task.processes
    return Work(
        tuned=layers * learned,
        stepped=1.0 * layers * steps * trained,
        exact=layers * watched,
        logits=3 * learned + watched,
    )


def solving(task: Task, layers: int, *, joint: bool, head: bool) -> Work:
    """GPTQ: runs of every layer, a Hessian for each input, its factor, and rounding against it; perhaps the
    output layer's too.

    Its errors are those of the rounding, and of held-out samples, in walks over the source and the result.
    """
    source, tokens = task.source, task.own * task.length
    work = walking(task, 4 if joint else 1, tokens, fast=not joint)
    for inputs in source.arch.inputs:
        shapes = [source.linear_shape(linear.name) for linear in inputs]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        work += _rounded(task, rows, columns)
        if joint:
            work += _moments(tokens, columns, rows) + _ridges(columns, rows)
    end = _rounded(task, source.sizes.vocabulary, source.sizes.hidden) if head else Work()
    return work * layers + end + walking(task, source.num_layers + layers, tokens / HELD_OUT)


def _rounded(task: Task, rows: int, columns: int) -> Work:
    """A Hessian, its factor, and rows that are rounded against it."""
    carried = rows * columns**2 / task.processes  # what rounding carries on; as much for the energies
    work = Work(products=task.own * task.length * columns**2 + carried, factors=columns**3 / 3)
    work += walking(task, 1, carried / (2 * _weights(task)), fast=True)
    return work + Work(rounded=rows * columns / task.processes)


def rounding(task: Task, layers: int) -> Work:
    """Quantizing every weight by itself."""
    return Work(coded=1.0 * layers * _weights(task))


def measuring(task: Task, layers: int, sequences: int | None, length: int) -> Work:
    """Perplexity: a pass over the sequences, and their logits."""
    tokens = -(-(sequences or 1024) // task.processes) * length
    return walking(task, layers, tokens) + Work(logits=tokens)


def _groups(task: Task, layers: int) -> list[int]:
    """The lengths of the groups that leave so many layers."""
    removed = task.source.num_layers - layers
    merged = min(removed, layers)
    return [1] * (layers - merged) + [1 + removed // merged] * merged


def _weights(task: Task) -> int:
    return task.source.count_weights(task.source.layer_tensor_names(0))


def _sum(works: Iterable[Work]) -> Work:
    return sum(works, Work())
