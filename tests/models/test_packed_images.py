"""Images of several sizes packed into one sequence: features and gradients of the images one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmbase.errors import MmbaseError
from mmbase.models.clip import CLIP, CLIPConfig
from mmbase.models.config import TextConfig, VisionConfig
from mmbase.models.openclip import from_openclip
from mmbase.models.vision import VisionTransformer

from .shrunk import build_openclip, our_config, randomise, relative, shrunk_config

SIZES = [(32, 32), (16, 48), (8, 8), (48, 16), (33, 39), (32, 32), (16, 8), (24, 24)]
"""With patches of 8: grids of equal numbers of patches but other shapes, one patch, pixels beyond whole patches."""
TOWERS = [
    {},
    {"pool": "average"},
    {"pool": "average", "class_token": False, "norm_after_pool": True, "layer_scale": 0.3},
    {"pool": "attention", "class_token": False, "norm_pre": False, "patch_bias": True},
    {"pool": "attention", "norm_after_pool": True, "activation": "quick_gelu"},
    {"pool": "average", "position_embedding": "sincos", "activation": "gelu_tanh"},
    {"stem": "conv", "stem_channels": [8, 16], "stem_blocks": [1, 1], "stem_stride": 4, "stem_norm": "layer"},
    {"layers": 0},
    {"layers": 0, "pool": "attention"},
]


def tower_of(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    config = {"width": 32, "heads": 2, "layers": 3, "image_size": 32, "patch_size": 8} | options
    return randomise(VisionTransformer(VisionConfig(**config), 16))


def images_of(sizes: list[tuple[int, int]] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def one_by_one(tower: VisionTransformer, images: list[Tensor]) -> Tensor:
    return torch.cat([tower(image[None]) for image in images])


def step(tower: VisionTransformer, run, images: list[Tensor], *, bf16: bool = False) -> list[Tensor]:
    """Features, gradients to the pixels, gradients to the parameters."""
    tower.zero_grad()
    leaves = [image.clone().requires_grad_() for image in images]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        features = run(leaves)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (features.float() * weight).sum().backward()
    gradients = [p.grad.clone() for p in tower.parameters() if p.grad is not None]
    return [features.detach().float(), *(leaf.grad for leaf in leaves), *gradients]


@pytest.mark.parametrize("options", TOWERS)
def test_features_and_gradients_are_those_of_the_images_one_by_one(options) -> None:
    tower = tower_of(**options)
    packed = step(tower, tower, images_of())
    expected = step(tower, lambda images: one_by_one(tower, images), images_of())
    assert len(packed) == len(expected) > 1 + len(SIZES)
    assert all(relative(ours, theirs) <= 3e-6 for ours, theirs in zip(packed, expected) if theirs.norm() > 1e-5)
    assert all(bool(ours.any()) == bool(theirs.any()) for ours, theirs in zip(packed, expected))


@pytest.mark.parametrize("options", TOWERS)
def test_bf16_is_as_close_to_float32_as_one_by_one(options) -> None:
    tower = tower_of(**options)
    exact = step(tower, tower, images_of())
    packed = step(tower, tower, images_of(), bf16=True)
    single = step(tower, lambda images: one_by_one(tower, images), images_of(), bf16=True)
    everything = [torch.cat([part.flatten() for part in parts[1:]]) for parts in (packed, single, exact)]
    for ours, theirs, expected in ([parts[0] for parts in (packed, single, exact)], everything):
        assert relative(ours, expected) <= 1.3 * relative(theirs, expected) + 1e-3


def test_features_are_openclips_of_each_size() -> None:
    """OpenCLIP's model is built anew for each size, its position embedding resampled as it does at loading."""
    from open_clip.model import resize_pos_embed

    cfg = shrunk_config("ViT-B-32-quickgelu")
    state = build_openclip(cfg).state_dict()
    ours = from_openclip(our_config(cfg), state).eval()
    images = images_of([(64, 64), (128, 64), (64, 96), (64, 64)])
    packed = ours.encode_image(images, normalize=True)
    for feature, image in zip(packed, images):
        theirs = build_openclip(cfg | {"vision_cfg": cfg["vision_cfg"] | {"image_size": tuple(image.shape[1:])}})
        resampled = dict(state)
        resize_pos_embed(resampled, theirs)
        theirs.load_state_dict(resampled)
        assert relative(feature, theirs.encode_image(image[None], normalize=True)[0]) <= 1e-5


def test_only_patches_of_the_images_enter_the_blocks() -> None:
    tower, shapes = tower_of(), []
    tower.transformer.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    tower(images_of())
    patches = sum((height // 8) * (width // 8) for height, width in SIZES)
    assert shapes == [(patches + len(SIZES), 32)]


@pytest.mark.parametrize("class_token", [True, False])
def test_patch_dropout_shortens_each_image(class_token) -> None:
    """Draws go image by image over those of one size; here one at a time, so that the same seed drops the same."""
    options = {"patch_dropout": 0.4, "class_token": class_token, "pool": "class" if class_token else "attention"}
    tower, images, shapes = tower_of(**options).train(), images_of([(16, 48), (8, 8), (40, 24), (32, 32)]), []
    handle = tower.transformer.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    torch.manual_seed(4)
    packed = step(tower, tower, images)
    handle.remove()
    torch.manual_seed(4)
    expected = step(tower, lambda leaves: one_by_one(tower, leaves), images)
    kept = [max(1, int(0.6 * patches)) + class_token for patches in (12, 1, 15, 16)]
    assert shapes == [(sum(kept), 32)]
    assert all(relative(ours, theirs) <= 3e-6 for ours, theirs in zip(packed, expected) if theirs.norm() > 1e-5)
    assert relative(packed[0], tower.eval()(images)) > 1e-2


def test_stochastic_depth_drops_whole_images() -> None:
    """An image whose second block is dropped has the features of a tower without that block."""
    tower, images = tower_of(drop_path=0.5, layers=2, pool="average").train(), images_of() * 4
    torch.manual_seed(0)
    dropped = tower(images)
    tower.transformer.blocks = tower.transformer.blocks[:1]
    without = tower(images)
    gone = [relative(feature, expected) < 1e-5 for feature, expected in zip(dropped, without)]
    assert 0 < sum(gone) < len(gone) / 2


@pytest.mark.parametrize("options", [{}, {"pool": "attention", "dropout": 0.1, "drop_path": 0.2}])
def test_activation_checkpointing_changes_nothing(options) -> None:
    found = []
    for flag in (False, True):
        tower = tower_of(checkpoint_activations=flag, **options).train()
        torch.manual_seed(3)
        found.append(step(tower, tower, images_of()))
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*found))


def test_images_of_one_size_in_a_list_are_a_batch() -> None:
    tower, images = tower_of(), images_of([(24, 40)] * 3)
    assert relative(tower(images), tower(torch.stack(images))) <= 1e-6


@pytest.mark.parametrize("options", [TOWERS[0], TOWERS[1], TOWERS[4], TOWERS[6]])
def test_compiles_without_graph_breaks(options) -> None:
    tower, images = tower_of(**options).eval(), images_of()
    torch._dynamo.reset()
    compiled = torch.compile(tower, fullgraph=True, backend="eager")
    assert relative(compiled(images), tower(images)) <= 2e-6
    compiled(images_of(SIZES[:3])).sum().backward()


def test_one_compiled_transformer_serves_all_sizes() -> None:
    tower, graphs = tower_of(), []
    torch._dynamo.reset()
    batches = [images_of(sizes) for sizes in (SIZES, SIZES[2:], SIZES[:5], SIZES[1:4], SIZES[4:], SIZES * 2)]
    expected = [tower(images) for images in batches]

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    tower.transformer.compile(fullgraph=True, backend=backend)
    found = [tower(images) for images in batches]
    assert all(relative(ours, theirs) <= 2e-6 for ours, theirs in zip(found, expected))
    assert len(graphs) <= 3  # numbers of tokens become dynamic once they change, the longest image's once it does


def test_exports_for_given_sizes() -> None:
    tower, images = tower_of().eval(), images_of()
    program = torch.export.export(tower, (images,)).module()
    others = [image.flip(-1) for image in images]
    assert relative(program(others), tower(others)) <= 2e-6


def test_nothing_waits_for_the_device() -> None:
    """On the meta device every look at a value raises."""
    tower = tower_of().to("meta")
    assert tower([image.to("meta") for image in images_of()]).shape == (len(SIZES), 16)


def test_the_whole_model_takes_lists_and_packed_texts() -> None:
    text = TextConfig(width=32, heads=2, layers=2, vocab_size=50, context_length=12)
    vision = VisionConfig(width=32, heads=2, layers=2, image_size=32, patch_size=8)
    model = randomise(CLIP(CLIPConfig(embed_dim=16, vision=vision, text=text)))
    ids = torch.randint(1, 40, (len(SIZES), 12))
    ids[:, 4] = 49
    out = model(images_of(), model.text.pack(ids))
    assert relative(out["image_features"], model.encode_image(images_of(), normalize=True)) <= 1e-6
    assert relative(out["text_features"], model.encode_text(ids, normalize=True)) <= 1e-6
    assert torch.allclose(out["image_features"].norm(dim=1), torch.ones(len(SIZES)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images given; pass at least one"),
        ([torch.zeros(3, 16, 16), torch.zeros(1, 16, 16)], r"image 1 must be a tensor \[3, H, W\], not \[1, 16, 16\]"),
        ([torch.zeros(1, 3, 16, 16)], r"image 0 must be a tensor \[3, H, W\], not \[1, 3, 16, 16\]"),
        (["cat.png"], r"image 0 must be a tensor \[3, H, W\], not str; normalise"),
        ([torch.zeros(3, 16, 7)], "image 0 has 16 x 7 pixels, less than one patch of 8 x 8; enlarge it"),
        (
            [torch.zeros(3, 16, 16), torch.zeros(3, 8, 8).half()],
            "image 1 is torch.float16 on cpu, image 0 torch.float32 on cpu; convert one of them",
        ),
        ([torch.zeros(3, 16, 16), torch.zeros(3, 8, 8, device="meta")], "image 1 is torch.float32 on meta, image 0"),
    ],
)
def test_images_that_cannot_be_packed_are_refused(images, message) -> None:
    with pytest.raises(MmbaseError, match=message):
        tower_of()(images)
