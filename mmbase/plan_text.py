"""A plan as it is printed."""

from __future__ import annotations

from mmbase.plan import LINK_EFFICIENCY, Plan
from mmbase.training.devices import NETWORK, gpu
from mmbase.training.units import say_bytes, say_count, say_flops, say_seconds


def describe(plan: Plan) -> list[str]:
    """Lines: what, then parameters, FLOPs, memory, communication, speed, time; assumptions are said where they are."""
    setup, last = plan.setup, plan.curriculum.segments[-1].stage
    what = "processes on one CPU" if setup.gpu == "cpu" else gpu(setup.gpu).title
    spread = "" if setup.gpus == 1 else f", {setup.kind}"
    micro = f", {setup.micro_batch:,} at a time" if setup.micro_batch else ""
    lines = [
        f"plan           {setup.gpus} x {what}, {setup.precision}{spread}; {last.batch_size:,} pairs a step, "
        f"{last.batch_size // setup.gpus:,} on each{micro}"
    ]
    counts = ", ".join(f"{name} {say_count(number)}" for name, number in plan.parameters.items())
    lines.append(f"parameters     {counts}")
    lines += _block("training", plan.curriculum.describe())
    image, text, loss = plan.work
    total = plan.work.total.both
    parts = ", ".join(
        f"{name} {work.both / total:.1%}" for name, work in (("images", image), ("texts", text), ("loss", loss))
    )
    lines.append(f"FLOPs          {say_flops(total)} a step of the last stage: {parts}")
    lines += _table("memory", plan.memory, "on each, at the stage that needs most; activations not packed")
    if plan.communication:
        lines += _table("communication", plan.communication, "sent by each in a step of the last stage")
    if setup.gpus > 1 and setup.gpu != "cpu":
        known = gpu(setup.gpu)
        inside = setup.gpus <= known.node
        link, where = (known.link, "within the node") if inside else (NETWORK, "between nodes, assumed")
        lines.append(
            f"links          {say_bytes(link)}/s one way from each {where}, of which {LINK_EFFICIENCY:.0%} is reached "
            "(assumed); gradients and weights travel during the backward pass (assumed)"
        )
    lines.append(f"speed          {say_flops(plan.speed)}/s of each; {plan.speed_source}")
    share = "" if setup.gpus == 1 or setup.gpu == "cpu" else f", {plan.compute_share:.1%} of the time computing"
    lines.append(f"expected       {say_count(plan.samples_per_second)} samples/s in the last stage{share}")
    lines.append(
        f"time           {say_seconds(plan.seconds)} for {say_count(plan.curriculum.total)} samples in "
        f"{plan.curriculum.step_count():,} steps; {plan.seconds * setup.gpus / 3600:,.2f} device hours"
    )
    return [*lines, *_block("note", plan.notes)]


def _block(name: str, lines: list[str]) -> list[str]:
    return [f"{name if number == 0 else '':<14} {line}" for number, line in enumerate(lines)]


def _table(name: str, sizes: dict[str, float], meaning: str) -> list[str]:
    total = sum(sizes.values())
    width = max(map(len, sizes))
    rows = [f"{part:<{width}}  {say_bytes(size):>8}  {size / total:4.0%}" for part, size in sizes.items()]
    return _block(name, [f"{say_bytes(total)} {meaning}", *rows])
