"""What a training will need, before it is begun: parameters, FLOPs, memory, communication, samples/s and hours.

Nothing is trained and no data is read. FLOPs are counted exactly. Speed is that of a measured device where there is
one, else an assumption that is said; links are the makers' figures.

Letters: N devices, M pairs of one device, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmbase.config import RunConfig, load_config, recipes
from mmbase.errors import MmbaseError
from mmbase.models.config import CLIPConfig
from mmbase.models.zoo import config_of
from mmbase.plan_memory import memory_of
from mmbase.plan_setup import Kind, Setup
from mmbase.training.curriculum import Curriculum, Stage
from mmbase.training.devices import GPUS, NETWORK, gpu
from mmbase.training.flops import Shapes, StepWork, step_work
from mmbase.training.measured import Measured, of_device

if TYPE_CHECKING:
    from torch import nn

ASSUMED_MFU = 0.40
"""Share of the peak that is assumed where nothing was measured on a device: what well-tuned ViT training reaches."""

LINK_EFFICIENCY = 0.8
"""Share of a link's stated speed that collectives are assumed to reach."""

FILLED = 0.92
"""Share of a GPU's memory that the parts of a plan may take: the rest is torch's, NCCL's, and lost between tensors."""


@dataclass
class Plan:
    """What :func:`make_plan` found; bytes, seconds and FLOPs, of one device where not said otherwise."""

    setup: Setup
    model: CLIPConfig
    parameters: dict[str, int]
    curriculum: Curriculum
    work: StepWork
    """of a step of the last stage, all devices together"""
    memory: dict[str, float]
    communication: dict[str, float]
    """bytes that a device sends in a step of the last stage"""
    speed: float
    """FLOP/s"""
    speed_source: str
    samples_per_second: float
    """of all devices together, in the last stage"""
    seconds: float
    """of the whole training"""
    compute_share: float
    """of a step's time, in the last stage"""
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        image, text, loss = self.work
        return {
            "gpus": self.setup.gpus,
            "gpu": self.setup.gpu,
            "precision": self.setup.precision,
            "parallel": self.setup.kind,
            "parameters": self.parameters,
            "flops_per_step": {"image": image.both, "text": text.both, "loss": loss.both},
            "flops": self.curriculum.flops_until(self.curriculum.total),
            "samples": self.curriculum.total,
            "steps": self.curriculum.step_count(),
            "memory_bytes": self.memory,
            "communication_bytes_per_step": self.communication,
            "flops_per_second": self.speed,
            "flops_per_second_source": self.speed_source,
            "samples_per_second": self.samples_per_second,
            "hours": self.seconds / 3600,
            "notes": self.notes,
        }


def make_plan(
    config: RunConfig,
    *,
    gpus: int = 1,
    device: str = "h200",
    recipe: str | None = None,
    kind: Kind | None = None,
    micro_batch: int | None = None,
    text_tokens: float | None = None,
    measured: float | None = None,
) -> Plan:
    """The plan of a run.

    Args:
        config: of the run.
        gpus: devices, of nodes of as many as are usual for them.
        device: short name (:data:`mmbase.training.devices.GPUS`), or ``cpu``.
        recipe: its name, by which a measurement of it is found.
        kind: over devices; None: as configured, else ddp.
        micro_batch: pairs of one device at a time; None: as configured.
        text_tokens: of a text on average, where texts are packed; None: the whole context is counted.
        measured: samples/s of one device in the last stage, as a short run of this configuration told; None: from
            :mod:`mmbase.training.measured`, or assumed.

    Raises:
        MmbaseError: an unknown GPU, a batch that cannot be divided among them.
    """
    setup = _setup(config, gpus, device, kind, micro_batch)
    notes: list[str] = []
    model = planned_model(config, notes)
    curriculum = Curriculum(config.training.curriculum, model, config.training, text_tokens=text_tokens)
    curriculum.loader_batch(gpus)
    stages = [segment.stage for segment in curriculum.segments]
    last = stages[-1]
    heaviest = max(stages, key=lambda stage: curriculum.flops_per_sample(stage) * setup.local(stage.batch_size))
    towers = _on_meta(model)
    parameters = count_parameters(towers)
    if measured is None:
        speed, source = _speed(setup, config.model.name, recipe)
    else:
        speed = measured * _computed(setup, curriculum, last) / last.batch_size
        source = f"given: {measured:,.4g} samples/s of one device, micro-batches and all"
    memory = memory_of(config, setup, model, towers, heaviest)
    seconds = 0.0
    for segment in curriculum.segments:
        steps = (segment.stop - segment.start) / segment.stage.batch_size
        seconds += steps * sum(_step_seconds(setup, curriculum, segment.stage, parameters["all"], speed))
    compute, exposed = _step_seconds(setup, curriculum, last, parameters["all"], speed)
    if setup.gpu != "cpu" and sum(memory.values()) > FILLED * GPUS[setup.gpu].memory:
        notes.append(
            f"this does not fit {GPUS[setup.gpu].title}: lower training.micro_batch, set "
            "training.checkpoint_activations=true, or training.parallel=fsdp"
        )
    return Plan(
        setup,
        model,
        parameters,
        curriculum,
        step_work(model, curriculum.shapes(last)),
        memory,
        communication(setup, model, last.batch_size, parameters["all"]),
        speed,
        source,
        last.batch_size / (compute + exposed),
        seconds,
        compute / (compute + exposed),
        notes,
    )


def planned_model(config: RunConfig, notes: list[str]) -> CLIPConfig:
    """The towers, with the vocabulary that the tokenizer will have; says in ``notes`` what it had to guess."""
    model = config.model.resolve()
    if config.model.name is not None:
        return model
    options, given = config.tokenizer.model_dump(), config.model.text
    text = model.text
    if options["kind"] == "learned":
        vocabulary, context = int(options.get("vocab_size", 2000)), int(options.get("context_length", 32))
    else:
        context = int(options.get("context_length", text.context_length))
        vocabulary = int(options.get("vocab_size", text.vocab_size))
        if options["kind"] != "clip" and "vocab_size" not in given:
            notes.append(f"vocabulary of {vocabulary:,} assumed: the tokenizer was not loaded")
    changes = {
        "vocab_size": given.get("vocab_size", vocabulary),
        "context_length": given.get("context_length", context),
    }
    return model.model_copy(update={"text": text.model_copy(update=changes)})


def count_parameters(towers: nn.Module) -> dict[str, int]:
    """Numbers of each tower, of its embeddings among them, and of all."""
    counts = {"image tower": 0, "text tower": 0, "of it token embeddings": 0, "all": 0}
    for name, parameter in towers.named_parameters():
        counts["all"] += parameter.numel()
        if name.startswith("visual."):
            counts["image tower"] += parameter.numel()
        elif name.startswith("text."):
            counts["text tower"] += parameter.numel()
        if name == "text.token_embedding.weight":
            counts["of it token embeddings"] += parameter.numel()
    return counts


def communication(setup: Setup, model: CLIPConfig, batch: int, parameters: int) -> dict[str, float]:
    """Bytes that a device sends in a step, as :class:`mmbase.losses.traffic.Traffic` counts them."""
    n = setup.gpus
    if n == 1:
        return {}
    others, rows = n - 1, batch / n
    narrow = 2 if setup.precision != "fp32" else 4
    sent: dict[str, float] = {}
    if setup.kind == "fsdp":
        parts = setup.parts(int(rows))
        again = 1 + setup.reshard_after_forward
        gathers = again if parts == 1 else (again + 1) * parts
        sent["weights gathered"] = gathers * others / n * narrow * parameters
        sent["gradients reduced"] = others / n * 4 * parameters
    else:
        sent["gradients summed"] = 2 * others / n * 4 * parameters
    features = 2 if setup.gpu != "cpu" and narrow == 2 else 4
    sent["text features gathered"] = rows * others * model.embed_dim * features
    sent["their gradients summed"] = rows * others * model.embed_dim * 4
    sent["statistics of the softmax"] = 2 * rows * others * 4
    return sent


def _on_meta(model: CLIPConfig) -> nn.Module:
    import torch

    from mmbase.models.clip import CLIP

    with torch.device("meta"):
        return CLIP(model)


def _step_seconds(
    setup: Setup, curriculum: Curriculum, stage: Stage, parameters: int, speed: float
) -> tuple[float, float]:
    """Seconds of computing and, beside it, of waiting for links, in a step."""
    work = step_work(curriculum.model, curriculum.shapes(stage)).total
    local, flops = setup.local(stage.batch_size), _computed(setup, curriculum, stage)
    devices = 1 if setup.gpu == "cpu" else setup.gpus  # processes of one machine share its cores
    compute = flops / devices / speed
    if setup.gpus == 1 or setup.gpu == "cpu":
        return compute, 0.0  # over gloo within a machine the cores copy: measured, not planned
    known = gpu(setup.gpu)
    link = (known.link if setup.gpus <= known.node else min(known.link, NETWORK)) * LINK_EFFICIENCY
    sent = communication(setup, curriculum.model, stage.batch_size, parameters)
    hidden = sum(size for name, size in sent.items() if name.startswith(("weights", "gradients"))) / link
    loss = sum(size for name, size in sent.items() if not name.startswith(("weights", "gradients"))) / link
    backward = compute * work.backward / flops / setup.parts(local)  # gradients travel with the last part's
    return compute, loss + max(0.0, hidden - backward)


def _computed(setup: Setup, curriculum: Curriculum, stage: Stage) -> float:
    """FLOPs of a step as devices compute them: the forward pass again for micro-batches, and again for checkpoints."""
    work = step_work(curriculum.model, curriculum.shapes(stage)).total
    again = (setup.parts(setup.local(stage.batch_size)) > 1) + setup.checkpoint_activations
    return work.both + work.forward * again


def _speed(setup: Setup, name: str | None, recipe: str | None) -> tuple[float, str]:
    """FLOP/s of one device in training, and where that is from."""
    known = of_device(setup.gpu, setup.precision)
    same = [one for one in known if one.model in (name, recipe)]
    if chosen := (same or known)[:1]:
        one = chosen[0]
        flops = _flops_of(one) * one.samples_per_second
        other = "" if same else "; another model, so a guess for this one"
        return flops, f"measured: {one.model} at {one.samples_per_second:,.4g} samples/s on {one.hardware} in " + (
            f"{one.precision} ({one.result}: {one.what}){other}"
        )
    if setup.gpu == "cpu":
        raise MmbaseError(f"nothing was measured on a CPU in {setup.precision}; use training.precision=fp32 or bf16")
    peak = gpu(setup.gpu).peak(setup.precision)
    return ASSUMED_MFU * peak, (
        f"assumed: {ASSUMED_MFU:.0%} of the peak of {peak / 1e12:,.0f} TFLOP/s; no training was measured on this GPU"
    )


def _flops_of(one: Measured) -> float:
    """Mean FLOPs of a sample of what was measured."""
    if one.model in recipes():
        config = load_config(one.model)
        whole = Curriculum(config.training.curriculum, planned_model(config, []), config.training)
        return whole.flops_until(whole.total) / whole.total
    model = config_of(one.model)
    assert model is not None, one.model
    shapes = Shapes(one.batch, model.vision.image_hw, text_length=one.text_length)
    return step_work(model, shapes).total.both / one.batch


def _setup(config: RunConfig, gpus: int, name: str, kind: Kind | None, micro_batch: int | None) -> Setup:
    if name != "cpu":
        gpu(name)
    sharded = config.training.parallel in ("fsdp", "hsdp")
    chosen: Kind = kind or ("fsdp" if sharded else "ddp")
    precision = config.training.precision
    if precision == "auto":
        precision = "bf16"
    return Setup(
        gpus,
        name,
        precision,
        "none" if gpus == 1 else chosen,
        micro_batch or config.training.micro_batch,
        config.training.checkpoint_activations,
        config.training.reshard_after_forward,
    )
