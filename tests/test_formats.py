"""Every format: what its schema promises of tensors is true of those of a layer that was really quantized."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from mkaq.dtypes import FLOATS
from mkaq.errors import UnsupportedError
from mkaq.formats import bitsandbytes, dense, gptq
from mkaq.formats.format import Format
from mkaq.formats.formats import FORMATS, format_of
from mkaq.formats.layer import dense_layer, split_linears
from mkaq.formats.packing import pack_linear
from mkaq.quantize.bnb import quantize_linear
from mkaq.quantize.gptq import gptq as solve

pytestmark = pytest.mark.usefixtures("one_thread")
Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")
SHAPES = [(64, 128), (512, 256)]
TYPES = {dtype: name for name, dtype in FLOATS.items()}
TYPES |= {torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8"}


def bnb(bits: int, quant_type: str | None = None, double_quant: bool | None = None) -> Config:
    return bitsandbytes.quantization_config(
        bits=bits, quant_type=quant_type, double_quant=double_quant, compute_dtype="float32"
    )


def gptq_config(bits: int, group_size: int = 32, sym: bool = True, scattered: bool = False) -> Config:
    return gptq.quantization_config(
        bits=bits,
        group_size=group_size,
        sym=sym,
        scattered=scattered,
        static_groups=False,
        damp_percent=0.01,
    )


CONFIGS: dict[str, Config | None] = {
    "dense": None,
    **{f"gptq, {bits} bits": gptq_config(bits) for bits in (2, 3, 4, 8)},
    "gptq, one group": gptq_config(4, -1),
    "gptq, without symmetry": gptq_config(3, sym=False),
    "gptq, scattered groups": gptq_config(4, 64, scattered=True),
    "int8": bnb(8),
    **{
        f"{kind}, double_quant {'on' if double else 'off'}": bnb(4, kind, double)
        for kind in ("nf4", "fp4")
        for double in (True, False)
    },
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")


def weight_of(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def stored(shape: tuple[int, int], config: Config | None) -> Tensors:
    """The tensors of a linear layer as the stages write them."""
    weight = weight_of(shape)
    if config is None:
        return {"weight": weight}
    if config["quant_method"] == "bitsandbytes":
        return quantize_linear(weight, config, CPU)
    inputs = torch.randn(4 * shape[1], shape[1], generator=torch.Generator().manual_seed(2))
    options = {"bits": config["bits"], "group_size": config["group_size"], "sym": config["sym"]}
    result = solve(weight.float(), inputs.T @ inputs, desc_act=config["desc_act"], **options)
    return pack_linear(result.codes, result.scales, result.zeros, result.g_idx, config["bits"])


@each_config
@each_shape
def test_schema_is_what_is_stored(shape: tuple[int, int], config: Config | None) -> None:
    found, expected = stored(shape, config), format_of(config).schema(shape, config or {})
    assert found.keys() == expected.keys()
    for name, (size, types) in expected.items():
        assert size is None or tuple(found[name].shape) == size, name
        assert TYPES[found[name].dtype] in types, name


@each_config
@each_shape
def test_stored_bytes_are_those_of_the_tensors(shape: tuple[int, int], config: Config | None) -> None:
    real = sum(tensor.nbytes for tensor in stored(shape, config).values())
    assert abs(format_of(config).stored_bytes(shape, config or {}) - real) <= max(300, 0.01 * real)


def inputs_for(columns: int) -> torch.Tensor:
    """What bfloat16 holds and int8 rounds to itself: 127 steps to each row's largest, which is no outlier."""
    steps = torch.randint(-127, 128, (7, columns), generator=torch.Generator().manual_seed(3))
    steps[:, 0] = 127
    return steps / 32


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@each_config
@each_shape
def test_restored_layer_multiplies_by_the_weight_that_is_meant(
    shape: tuple[int, int], config: Config | None, bias: bool
) -> None:
    kind, told, tensors = format_of(config), config or {}, stored(shape, config)
    added = torch.linspace(-2, 2, shape[0])
    if bias:
        tensors["bias"] = added.clone()
    meant = kind.dequantize(tensors, told).float()
    like = nn.Linear(shape[1], shape[0], bias=bias, device="meta").eval()
    module = kind.restore(kind.read(dict(tensors), told), like, told, CPU, torch.float32)
    inputs = inputs_for(shape[1])
    expected = inputs.double() @ meant.double().T + (added.double() if bias else 0)
    found = module(inputs)
    assert found.dtype == torch.float32 and not module.training
    close = 5e-3 if kind is bitsandbytes else 1e-6  # the library rounds to float16, or bfloat16 on some CPUs
    assert float((found - expected).norm() / expected.norm()) < close


@each_config
def test_weight_that_is_meant_is_near_the_weight(config: Config | None) -> None:
    """Random numbers in so many bits, whose errors another order of rows, nibbles or scales does not have."""
    kind, told = format_of(config), config or {}
    weight = weight_of((512, 256)).float()
    meant = kind.dequantize(stored((512, 256), config), told)
    assert meant.shape == weight.shape
    most = {None: 0.0, 2: 0.45, 3: 0.25, 4: 0.15, 8: 0.01}[kind.bits(told)]
    assert float((meant.float() - weight).norm() / weight.norm()) <= most


@pytest.mark.parametrize(
    ("config", "expected"),
    [(None, (dense, None)), (bnb(4, "nf4", True), (bitsandbytes, 4)), (bnb(8), (bitsandbytes, 8))]
    + [(gptq_config(bits), (gptq, bits)) for bits in (2, 3, 4, 8)],
    ids=str,
)
def test_format_and_its_bits(config: Config | None, expected: tuple[Format, int | None]) -> None:
    assert (format_of(config), format_of(config).bits(config or {})) == expected


@pytest.mark.parametrize("config", [{}, {"quant_method": None}, *({"quant_method": m} for m in (
    "awq", "GPTQ", "", "dense", ["gptq"], {"gptq": 1}, 4
))], ids=str)  # fmt: skip
def test_unknown_method_is_refused(config: Config) -> None:
    with pytest.raises(UnsupportedError, match=r"quantization .* is not supported"):
        format_of(config, "config.json")
    assert set(FORMATS) == {"gptq", "bitsandbytes", "compressed-tensors"}


def test_version_2_has_zero_points_as_they_are() -> None:
    first, config = stored((64, 128), CONFIGS["gptq, 4 bits"]), gptq_config(4)
    second = first | {"qzeros": first["qzeros"] + 0x11111111}
    again = gptq.dequantize(second, config | {"checkpoint_format": "gptq_v2"})
    assert torch.equal(gptq.dequantize(first, config), again)
    assert not torch.equal(gptq.dequantize(second, config), again)


def layer_of(config: Config | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Two linear layers, of which the name of one begins like the other's, and a norm."""
    for name in ("mlp.up", "mlp.up_proj"):
        yield from ((f"{name}.{part}", tensor) for part, tensor in stored((64, 128), config).items())
    yield "mlp.up.bias", torch.ones(64)
    yield "mlp.up_norm.weight", torch.zeros(5)


@each_config
def test_tensors_of_a_layer_go_to_its_linear_layers(config: Config | None) -> None:
    names = ("mlp.up", "mlp.up_proj")
    own, rest = split_linears(dict(layer_of(config)), names)
    assert own.keys() == set(names) and rest.keys() == {"mlp.up_norm.weight"}
    parts = stored((64, 128), config).keys()
    assert own["mlp.up"].keys() == parts | {"bias"} and own["mlp.up_proj"].keys() == parts
    made = dense_layer(dict(layer_of(config)), names, config)
    assert made.keys() == {"mlp.up.weight", "mlp.up.bias", "mlp.up_proj.weight", "mlp.up_norm.weight"}
    expected = format_of(config).dequantize(stored((64, 128), config), config or {})
    assert torch.equal(made["mlp.up.weight"], expected) and torch.equal(made["mlp.up.bias"], torch.ones(64))
