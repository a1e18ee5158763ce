"""Layer maps and layouts of models that nobody thought of: nothing is lost, doubled or swapped."""

import itertools
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mkaq.arch.config import PER_LAYER_LISTS, keep_layers
from mkaq.arch.families import FAMILIES
from mkaq.checkpoint.layout import TensorSpec, fill_shards, layout_like
from mkaq.checkpoint.reader import Checkpoint, TensorInfo

few = settings(derandomize=True, database=None, deadline=None, max_examples=60)


def kept_of(count: int) -> st.SearchStrategy[list[int]]:
    """Some of so many layers, in order."""
    return st.lists(st.integers(0, count - 1), min_size=1, unique=True).map(sorted)


@given(count=st.integers(2, 20), data=st.data())
@few
def test_layers_lost_in_two_steps_are_lost_in_one(count: int, data: st.DataObject) -> None:
    config: dict[str, Any] = {"num_hidden_layers": count, "hidden_size": 8}
    for key in data.draw(st.sets(st.sampled_from(sorted(PER_LAYER_LISTS)))):
        config[key] = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    if data.draw(st.booleans()):
        config["max_window_layers"] = data.draw(st.integers(0, count + 3))
    kept = data.draw(kept_of(count))
    once = keep_layers(config, {}, kept, "config.json")
    assert once["num_hidden_layers"] == len(kept) and once["hidden_size"] == 8
    for key in PER_LAYER_LISTS & config.keys():
        assert once[key] == [config[key][index] for index in kept]
    again = data.draw(kept_of(len(kept)))
    twice = keep_layers(once, {}, again, "config.json")
    assert twice == keep_layers(config, {}, [kept[index] for index in again], "config.json")


@given(sizes=st.lists(st.integers(0, 40)), most=st.integers(1, 100))
@few
def test_shards_are_filled_in_order(sizes: list[int], most: int) -> None:
    layout = {str(number): TensorSpec(torch.uint8, (size,)) for number, size in enumerate(sizes)}
    shards = fill_shards(layout, most)
    assert [name for shard in shards for name in shard] == list(layout)
    held = [[spec.nbytes for spec in shard.values()] for shard in shards]
    assert all(len(shard) == 1 or sum(shard) <= most for shard in held)
    assert all(sum(one) + two[0] > most for one, two in itertools.pairwise(held))


@given(family=st.sampled_from(sorted(FAMILIES)), count=st.integers(1, 12), data=st.data())
@few
def test_new_layers_have_the_names_and_shapes_of_those_kept(
    family: str, count: int, data: st.DataObject
) -> None:
    arch = FAMILIES[family]
    shapes = {arch.embed_weight: (7, 7), arch.head_weight: (9,)}
    for layer, name in itertools.product(range(count), (*arch.linear_names, arch.mlp_norm)):
        shapes[arch.in_layer(layer, f"{name}.weight")] = (layer + 1, len(name))
        assert arch.split(arch.in_layer(layer, f"{name}.weight")) == (layer, f"{name}.weight")
    tensors = {name: TensorInfo("x", "F16", shape, 0) for name, shape in shapes.items()}
    source = Checkpoint(Path(), {"model_type": family, "num_hidden_layers": count}, tensors)
    kept = data.draw(kept_of(count))
    layout = layout_like(source, kept, torch.float16)
    assert len(layout) == 2 + len(kept) * (len(arch.linear_names) + 1)
    for name, (dtype, shape) in layout.items():
        layer, relative = arch.split(name) or (None, name)
        before = name if layer is None else arch.in_layer(kept[layer], relative)
        assert (dtype, shape) == (torch.float16, shapes[before])
