"""What benchmarks/gpu_check.py found, as Markdown tables."""

from typing import Any


def tables(record: dict[str, Any]) -> str:
    """All tables, from what gpu.json holds."""
    device, parts = record["device"], record["parts"]
    lines = [f"`{record['command']}`: {device['name']}, {describe(record)}", ""]
    lines += [f"Without {name}: {told}." for name, told in record["absent"].items()]
    lines += ["", "| part | status | s | device GB | host GB | |", "|---|---|---|---|---|---|"]
    for name, part in parts.items():
        peaks = [gigabytes(part.get(key)) for key in ("peak_device_bytes", "peak_host_bytes")]
        why = " ".join((part.get("error") or "").replace("|", "/").split())[:160]
        lines.append(
            f"| {name} | {part['status']} | {part.get('seconds', 0):.1f} | {' | '.join(peaks)} | {why} |"
        )
    found = {name: part["found"] for name, part in parts.items() if part.get("found")}
    runs = {name: row for name, row in found.items() if "verify" in row}
    lines += agreement({name: row for name, row in runs.items() if name.startswith("small/")})
    lines += kernels(found.get("large/kernels"))
    lines += stages({name: row for name, row in runs.items() if name.startswith("large/")})
    lines += products(found.get("large/products", {}))
    return "\n".join(lines) + "\n"


def describe(record: dict[str, Any]) -> str:
    """The machine and the libraries, in words."""
    device, machine, libraries = record["device"], record["machine"], record["libraries"]
    told = [f"{machine['cores']} cores", f"torch {libraries['torch']}"]
    told += [f"{key} {device[key]}" for key in ("cuda", "driver") if device.get(key)]
    return ", ".join(
        [*told, f"transformers {libraries['transformers']}", f"{record['seconds']:.0f} s in all"]
    )


def agreement(found: dict[str, dict[str, Any]]) -> list[str]:
    """How the runs on the device compare with those on the CPU."""
    if not found:
        return []
    lines = [
        "",
        "The small model on the device and on the CPU: the groups of layers, the share of codes that are "
        "equal, |difference|^2 / |all|^2 of the weights and of the last hidden states, perplexity on the "
        "device over that on the CPU, and the exit code of `verify --source` of the device's artifact.",
        "",
        "| recipe | groups | codes equal | weights | hidden | perplexity | verify, device | verify, CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        codes = "-" if row["codes_equal"] is None else f"{row['codes_equal']:.4f}"
        groups = {None: "-", True: "same", False: "other"}[row["groups_same"]]
        ratio = list(row["perplexity_ratio"].values())[-1:] or [None]
        cells = [name.removeprefix("small/"), groups, codes, f"{row['weight_difference']:.1e}"]
        cells += [f"{row['hidden_difference']:.1e}", "-" if ratio[0] is None else f"{ratio[0]:.4f}"]
        cells += [str(row["verify"][place]["exit"]) for place in ("device", "cpu")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def kernels(found: dict[str, Any] | None) -> list[str]:
    """Seconds of GPTQ with each kind of inner loops."""
    if not found:
        return []
    size = f"{found['rows']} x {found['columns']}"
    lines = [
        "",
        f"GPTQ of a random weight of {size} in groups of {found['group_size']}, by each kind of inner loops:",
        "",
        "| inner loops | s | first, of 256 columns, s |",
        "|---|---|---|",
    ]
    for name, row in found["loops"].items():
        lines.append(f"| {name} | {row['seconds']:.3f} | {row['first']:.3f} |")
    lines += [
        "",
        f"What {found['fastest']} gives beside what the plain loops give; a close call that falls the other "
        "way changes the rest of its row:",
        "",
        "| weight | codes equal | whole rows equal | scales equal | errors |",
        "|---|---|---|---|---|",
    ]
    for name, row in {size: found, **found["others"]}.items():
        cells = [name, *(f"{row[key]:.5f}" for key in ("codes_equal", "rows_equal", "scales_equal"))]
        lines.append(f"| {' | '.join(cells)} | {row['error_ratio']:.6f} |")
    return lines


def stages(found: dict[str, dict[str, Any]]) -> list[str]:
    """Seconds of every stage of the large runs."""
    if not found:
        return []
    model = next(iter(found.values()))["model"]
    size = f"{model['layers']} layers ({model['bytes'] / 1e9:.1f} GB)"
    lines = [
        "",
        f"Seconds of the stages on {model['shape']}, {size}, {model['tokens']:,} calibration tokens:",
        "",
        "| recipe | stage | s | device GB | as planned | host GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        for stage in row["stages"]:
            cells = [name.removeprefix("large/"), stage["stage"], f"{stage['seconds']:.1f}"]
            keys = ("peak_device_bytes", "expected_bytes", "peak_host_bytes")
            lines.append(f"| {' | '.join([*cells, *(gigabytes(stage[key]) for key in keys)])} |")
    return lines


def products(found: dict[str, dict[str, Any]]) -> list[str]:
    """The share of a layer's work that is matrix products."""
    if not found:
        return []
    lines = [
        "",
        "The work of one layer under torch's profiler (which slows what consists of many small operations): "
        "seconds in all, of operations on the device, and of those that are matrix products.",
        "",
        "| work | as in | s | operations, s | products, s | products / operations | products / all |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        cells = [name, row["as_in"], *(f"{row[key]:.3f}" for key in ("seconds", "operations", "products"))]
        cells += [share(row["products"], row["operations"]), share(row["products"], row["seconds"])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def gigabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f}"


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole > 0 else "-"
