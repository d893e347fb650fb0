"""What people use: load, create, classify, encode, export, from every source that a model may come from."""

import numpy as np
import pytest
import torch
from PIL import Image

import mmbase
from mmbase.errors import MmbaseError
from mmbase.models.config import CLIPConfig, TextConfig, VisionConfig

TINY = CLIPConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=16, width=32, heads=2, layers=2),
    text=TextConfig(width=32, heads=2, layers=2),
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return mmbase.create(TINY, device="cpu")


def picture(seed=0, size=(40, 50)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_one_image_of_any_kind(model, tmp_path):
    array = picture()
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    kinds = [
        path,
        str(path),
        path.read_bytes(),
        Image.fromarray(array),
        array,
        torch.from_numpy(array).permute(2, 0, 1),
    ]
    features = [model.encode_image(kind) for kind in kinds]
    assert all(f.shape == (1, 16) and f.dtype == np.float32 for f in features)
    assert all(np.array_equal(f, features[0]) for f in features)
    assert np.linalg.norm(features[0]) == pytest.approx(1, abs=1e-5)


def test_batches_do_not_change_features(model):
    images = [picture(seed) for seed in range(5)]
    whole, pieces = model.encode_image(images), model.encode_image(images, batch_size=2)
    assert np.allclose(whole, pieces, atol=1e-6)
    stacked = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images])
    assert np.allclose(model.encode_image(stacked), whole, atol=1e-6)
    texts = [f"text {i}" for i in range(5)]
    assert np.allclose(model.encode_text(texts), model.encode_text(texts, batch_size=2), atol=1e-6)
    assert model.encode_text("one").shape == (1, 16)


def test_classify_is_softmax_of_scaled_cosines(model):
    labels = ["cat", "dog", "bird"]
    image, texts = model.encode_image(picture())[0], model.encode_text(labels)
    logits = model.logit_scale * texts @ image
    expected = np.exp(logits) / np.exp(logits).sum()
    result = model.classify(picture(), labels)
    assert [name for name, _ in result] == [labels[i] for i in np.argsort(-expected)]
    assert [p for _, p in result] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    assert len(model.classify([picture(), picture(1)], labels, k=2)) == 2
    classifier = model.classifier(labels, templates="imagenet")
    assert classifier([picture(), picture(1)]).shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.classify("missing.png", ["a"]), r"missing\.png"),
        (lambda m: m.classify(picture(), []), "label"),
        (lambda m: m.classify(picture(), ["a"], templates="no braces"), r"\{\}"),
        (lambda m: m.encode_image([]), "no images"),
        (lambda m: m.encode_text([]), "no texts"),
        (lambda m: m.encode_text([3]), "int"),
        (lambda m: m.encode_image(np.zeros((2, 3, 4, 5, 6))), "shape|dimensions"),
        (lambda m: m.export("onyx", "x"), "unknown export format 'onyx'"),
        (lambda _: mmbase.load("ViT-B-23", "openai"), "ViT-B-32"),
        (lambda _: mmbase.load("ViT-B-32"), "which weights"),
        (lambda _: mmbase.load("ViT-B-32", "laion2b_s34b_b79"), "laion2b_s34b_b79k"),
        (lambda _: mmbase.load("ViT-B-32", "no/such.pt"), "no weights file"),
        (lambda _: mmbase.create("ViT-B-32", device="cdua"), "cdua"),
    ],
)
def test_mistakes_are_one_line(model, call, message):
    with pytest.raises(MmbaseError, match=message) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_export_to_openclip_and_back(model, tmp_path):
    import open_clip

    folder = model.export("openclip", tmp_path / "oc")
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    image = torch.from_numpy(model.preprocess(picture()))[None]
    with torch.no_grad():
        want = theirs.encode_image(image, normalize=True).numpy()
        tokens = open_clip.get_tokenizer("ViT-B-32")(["a cat"])
        want_text = theirs.encode_text(tokens, normalize=True).numpy()
    assert np.allclose(model.encode_image(picture()), want, atol=1e-5)
    assert np.allclose(model.encode_text("a cat"), want_text, atol=1e-5)
    assert np.allclose(mmbase.load(folder, device="cpu").encode_text("a cat"), want_text, atol=1e-5)
    with pytest.raises(MmbaseError, match="not empty"):
        model.export("openclip", folder)


def test_export_to_huggingface_and_back(model, tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    folder = model.export("huggingface", tmp_path / "hf")
    theirs = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=["a cat"], images=[Image.fromarray(picture())], return_tensors="pt", padding=True)
    with torch.no_grad():
        out = theirs(**inputs)
    assert np.allclose(model.encode_text("a cat"), out.text_embeds.numpy(), atol=1e-5)
    assert np.allclose(model.encode_image(picture()), out.image_embeds.numpy(), atol=2e-3)  # their resize rounds
    assert np.allclose(mmbase.load(folder, device="cpu").encode_text("a cat"), model.encode_text("a cat"), atol=1e-5)


def test_a_convolutional_stem_cannot_be_exported_and_nothing_is_left(tmp_path):
    vision = VisionConfig(image_size=32, stem="conv", width=32, heads=2, layers=1)
    model = mmbase.create(TINY.model_copy(update={"vision": vision}), device="cpu")
    for name in ("openclip", "huggingface"):
        with pytest.raises(MmbaseError, match="stem"):
            model.export(name, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_names_of_openclip(tmp_path):
    model = mmbase.create("ViT-S/32", device="cpu") if "ViT-S-32" in {m.name for m in mmbase.list_models()} else None
    assert model is not None and model.image_size == (224, 224)
    torch.save(model.module.state_dict(), tmp_path / "ours.pt")
    again = mmbase.load("ViT-S-32", tmp_path / "ours.pt", device="cpu")
    assert np.allclose(again.encode_text("a cat"), model.encode_text("a cat"), atol=1e-6)
    counts = model.parameter_counts()
    assert counts["image"] + counts["text"] + 1 == counts["total"]


def test_a_model_of_openclips_own_behaves_alike():
    model = mmbase.create("RN50", device="cpu")
    (first, p), (second, q) = model.classify(picture(size=(224, 224)), ["cat", "dog"])
    assert {first, second} == {"cat", "dog"} and p + q == pytest.approx(1, abs=1e-5)
    assert model.logit_scale == pytest.approx(1 / 0.07, rel=1e-5) and model.logit_bias is None
    assert model.parameter_counts()["image"] > 3e7
    with pytest.raises(MmbaseError, match="OpenCLIP's own model"):
        model.export("openclip", "nowhere")


def test_untrained_run_says_so(tmp_path):
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(MmbaseError, match="no weights yet"):
        mmbase.load(tmp_path)


def test_a_run_of_emoji_vit_loads_in_openclip_and_transformers(tmp_path):
    import open_clip
    from transformers import CLIPModel

    small = ["training.steps=2", "training.warmup_steps=1", "training.batch_size=16", "evaluation.tasks=[]"]
    shard = ["data.shards=emoji:noto-000.tar", "model.vision.layers=1", f"output={tmp_path / 'run'}", "device=cpu"]
    model = mmbase.load(mmbase.train("emoji-vit", *small, *shard), device="cpu")
    pixels = torch.from_numpy(model.preprocess(picture()))[None]
    tokens = torch.from_numpy(model.tokenizer(["a cat", "red heart"]))
    openclip = open_clip.create_model(f"local-dir:{model.export('openclip', tmp_path / 'oc')}").eval()
    theirs = CLIPModel.from_pretrained(model.export("huggingface", tmp_path / "hf")).eval()
    with torch.no_grad():
        assert np.allclose(model.encode_image(picture()), openclip.encode_image(pixels, normalize=True), atol=1e-5)
        assert np.allclose(
            model.encode_text(["a cat", "red heart"]), openclip.encode_text(tokens, normalize=True), atol=1e-5
        )
        out = theirs(input_ids=tokens, pixel_values=pixels, attention_mask=torch.ones_like(tokens))
    assert np.allclose(model.encode_image(picture()), out.image_embeds, atol=1e-5)
    assert np.allclose(model.encode_text(["a cat", "red heart"]), out.text_embeds, atol=1e-5)
