"""Weights in and out: files, folders, tags and hubs (their downloads replaced by local files), and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmbase.errors import MmbaseError
from mmbase.models import zoo
from mmbase.models.clip import CLIP, CLIPConfig
from mmbase.models.config import TextConfig, VisionConfig
from mmbase.models.openclip import save_openclip, to_openclip, to_openclip_state
from mmbase.models.openclip_config import to_openclip_config
from mmbase.models.state_dicts import read_state_dict
from mmbase.models.weights import build, load_weights

from .shrunk import inputs, our_config, randomise, relative, shrunk_config

CLIP_TOKENIZER = {"kind": "clip", "context_length": 11}


@pytest.fixture
def model() -> CLIP:
    torch.manual_seed(0)
    return randomise(CLIP(our_config(shrunk_config("ViT-B-32")))).eval()


@pytest.fixture
def folder(model: CLIP, tmp_path: Path) -> Path:
    save_openclip(model, tmp_path / "saved", zoo.preprocess_of("ViT-L-14-CLIPA") | {"size": 64}, CLIP_TOKENIZER)
    return tmp_path / "saved"


@pytest.fixture
def small_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give two of OpenCLIP's names shrunk configs."""
    configs = dict(zoo._configs())
    for name in ("ViT-B-32", "ViT-B-32-quickgelu"):
        configs[name] = shrunk_config(name)
    zoo._convert.cache_clear()
    monkeypatch.setattr(zoo, "_configs", lambda: configs)
    yield
    zoo._convert.cache_clear()


def assert_same(a: torch.nn.Module, b: CLIP) -> None:
    image, text = inputs(b.image_size, b.config.text)
    with torch.no_grad():
        assert relative(a.eval().encode_image(image), b.encode_image(image)) <= 1e-6
        assert relative(a.encode_text(text), b.encode_text(text)) <= 1e-6


def test_openclip_loads_our_folder_with_equal_features(model: CLIP, folder: Path) -> None:
    import open_clip

    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert_same(theirs, model)
    assert theirs.visual.preprocess_cfg["resize_mode"] == "squash"
    assert theirs.visual.preprocess_cfg["mean"] == pytest.approx(zoo.preprocess_of("ViT-L-14-CLIPA")["mean"])
    assert "BILINEAR" in str(preprocess).upper()


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_folder_round_trip(model: CLIP, folder: Path, prefix: str) -> None:
    loaded, info = load_weights(f"{prefix}{folder}")
    assert_same(loaded, model)
    assert loaded.config.model_dump(exclude={"vision", "text"}) == model.config.model_dump(exclude={"vision", "text"})
    assert info["name"] == "saved"
    assert info["tokenizer"] == CLIP_TOKENIZER
    assert info["preprocess"]["resize_mode"] == "squash"
    assert info["preprocess"]["size"] == 64


def test_file_beside_its_config(model: CLIP, folder: Path) -> None:
    assert_same(load_weights(folder / "open_clip_model.safetensors")[0], model)


@pytest.mark.parametrize("layout", ["plain", "training checkpoint", "compiled", "half"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_name_with_a_local_file(model: CLIP, tmp_path: Path, small_zoo: None, layout: str, suffix: str) -> None:
    state = to_openclip_state(model)
    path = tmp_path / f"weights{suffix}"
    if layout == "training checkpoint" and suffix == ".pt":
        content = {"epoch": 3, "name": "run", "state_dict": {f"module.{key}": value for key, value in state.items()}}
    elif layout == "compiled":
        content = {f"_orig_mod.{key}": value for key, value in state.items()}
    elif layout == "half":
        content = {key: value.half() for key, value in state.items()}
    else:
        content = state
    torch.save(content, path) if suffix == ".pt" else save_file(content, path)
    loaded, info = load_weights("ViT-B/32", path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    if layout != "half":
        assert_same(loaded, model)
    assert info["name"] == "ViT-B-32" and str(path) in info["source"]
    assert info["tokenizer"]["kind"] == "clip" and info["preprocess"]["mean"] == zoo.OPENAI_MEAN


def test_our_own_state_dict_with_a_name(model: CLIP, tmp_path: Path, small_zoo: None) -> None:
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    assert_same(load_weights("ViT-B-32", tmp_path / "own.safetensors")[0], model)


def test_tag_is_downloaded_by_open_clip(
    model: CLIP, folder: Path, small_zoo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip.pretrained

    asked = []

    def download(entry: dict) -> str:
        asked.append(entry["hf_hub"])
        return str(folder / "open_clip_model.safetensors")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", download)
    loaded, info = load_weights("ViT-B-32", "laion2b_s34b_b79k")
    assert_same(loaded, model)
    assert asked == ["laion/CLIP-ViT-B-32-laion2B-s34B-b79K/"]
    assert info["source"] == "ViT-B-32 laion2b_s34b_b79k"
    with pytest.warns(UserWarning, match="ViT-B-32-quickgelu has the right activation"):
        load_weights("ViT-B-32", "openai")


def test_failed_download_says_what_to_do(small_zoo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip.pretrained

    def download(entry: dict) -> str:
        raise FileNotFoundError("no route\nto host")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", download)
    with pytest.raises(MmbaseError, match="cannot download 'laion2b_e16' of ViT-B-32: no route to host; fetch"):
        load_weights("ViT-B-32", "laion2b_e16")


def test_hub_name(model: CLIP, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip.pretrained

    def download(model_id: str, filename: str = "open_clip_model.safetensors") -> str:
        assert model_id == "org/name"
        return str(folder / filename)

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", download)
    loaded, info = load_weights("hf-hub:org/name")
    assert_same(loaded, model)
    assert (info["name"], info["source"]) == ("org/name", "hf-hub:org/name")


def test_weights_alone_are_recognised_where_one_model_fits(model: CLIP, tmp_path: Path, small_zoo: None) -> None:
    path = tmp_path / "weights.pt"
    torch.save(to_openclip_state(model), path)
    with pytest.raises(MmbaseError, match=r"give its name \(ViT-B-32 or ViT-B-32-quickgelu\)"):
        load_weights(path)
    zoo._configs()["ViT-B-32-quickgelu"]["text_cfg"]["vocab_size"] = 5
    zoo._convert.cache_clear()
    loaded, info = load_weights(path)
    assert_same(loaded, model)
    assert info["name"] == "ViT-B-32"


def test_softmax_weights_start_a_sigmoid_model(model: CLIP) -> None:
    from mmbase.models.openclip import from_openclip

    loaded = from_openclip(model.config.model_copy(update={"init_logit_bias": -10.0}), to_openclip_state(model))
    assert loaded.logit_bias is not None and loaded.logit_bias.item() == 0.0


# ------------------------------------------------------------------------------------------------ what is refused


class Evil:
    def __reduce__(self):
        return print, ("code was run",)


def test_pickles_are_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "args": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(MmbaseError, match=name) as caught:
            read_state_dict(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "code was run" not in capsys.readouterr().out


def test_torchscript_archives_are_refused(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "scripted.pt"))
    with pytest.raises(MmbaseError, match="TorchScript archive"):
        read_state_dict(tmp_path / "scripted.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut off"])
def test_damaged_files(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(content)
    with pytest.raises(MmbaseError, match="damaged") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


def test_truncated_files(model: CLIP, tmp_path: Path) -> None:
    for name, save in (("cut.pt", torch.save), ("cut.safetensors", save_file)):
        save(to_openclip_state(model), tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(MmbaseError, match="cut"):
            read_state_dict(tmp_path / name)


def test_other_content(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(MmbaseError, match="holds no state dict"):
        read_state_dict(tmp_path / "list.pt")
    with pytest.raises(MmbaseError, match="no weights file"):
        read_state_dict(tmp_path / "absent.pt")


def test_weights_of_another_model(model: CLIP, tmp_path: Path, small_zoo: None) -> None:
    state = to_openclip_state(model)
    cases = {
        "lacks": {key: value for key, value in state.items() if key != "ln_final.bias"},
        "no place for": state | {"visual.extra": torch.zeros(1)},
        "has shape": state | {"ln_final.bias": torch.zeros(3)},
    }
    for message, broken in cases.items():
        save_file(broken, tmp_path / "broken.safetensors")
        with pytest.raises(MmbaseError, match=message) as caught:
            load_weights("ViT-B-32", tmp_path / "broken.safetensors")
        assert "broken.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "pretrained", "message"),
    [
        ("ViT-B-33", "openai", "unknown model 'ViT-B-33'; did you mean"),
        ("ViT-B-32", None, "which weights of ViT-B-32.*mmbase.create"),
        ("ViT-B-32", "opnai", "did you mean 'openai'"),
        ("ViT-B-32", "absent.pt", "no weights file 'absent.pt'"),
        ("absent.safetensors", None, "no weights file 'absent.safetensors'"),
        ("runs/emojj", None, "no file or folder 'runs/emojj'"),
        ("local-dir:absent", None, "no folder 'absent'"),
        ("hf-hub:org/name", "openai", "has its own weights"),
        (".", None, "holds no model"),
    ],
)
def test_sources_that_do_not_exist(
    source: str, pretrained: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MmbaseError, match=message):
        load_weights(source, pretrained)


def test_broken_folders(folder: Path) -> None:
    config = folder / "open_clip_config.json"
    original = json.loads(config.read_text())
    for content, message in (
        ("{", "cannot read"),
        ("{}", "no 'model_cfg'"),
        (json.dumps({"model_cfg": {"embed_dim": 4}}), "needs the key 'vision_cfg'"),
        (json.dumps({"model_cfg": original["model_cfg"] | {"embed_dmi": 4}}), "did you mean 'embed_dim'"),
    ):
        config.write_text(content)
        with pytest.raises(MmbaseError, match=message):
            load_weights(folder)
    config.write_text(json.dumps(original))
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(MmbaseError, match="no weight file"):
        load_weights(folder)


# ------------------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize(
    ("vision", "text", "field"),
    [
        ({"stem": "conv"}, {}, "vision.stem='conv'"),
        ({"class_token": False, "pool": "average"}, {}, "vision.class_token=False"),
        ({"patch_bias": True}, {}, "vision.patch_bias=True"),
        ({"pool": "attention"}, {}, "vision.pool='attention'"),
        ({"activation": "quick_gelu"}, {}, "vision.activation='quick_gelu'"),
        ({}, {"pool": "mean"}, "text.pool='mean'"),
        ({}, {"causal": False, "mask_padding": True}, "text.mask_padding=True"),
    ],
)
def test_fields_without_an_openclip_equivalent_are_named(vision: dict, text: dict, field: str) -> None:
    config = CLIPConfig(vision=VisionConfig(**vision), text=TextConfig(**text))
    with pytest.raises(MmbaseError, match=f"{field} has no OpenCLIP equivalent"):
        to_openclip_config(config)


def test_hugging_face_tokenizer_is_named_in_the_config(model: CLIP) -> None:
    tokenizer = {"kind": "hf", "source": "timm/ViT-B-16-SigLIP", "context_length": 11, "clean": "canonicalize"}
    text_cfg = to_openclip(model, tokenizer)[0]["text_cfg"]
    assert text_cfg["hf_tokenizer_name"] == "timm/ViT-B-16-SigLIP"
    assert text_cfg["tokenizer_kwargs"] == {"clean": "canonicalize"}
    assert zoo.tokenizer_description("ViT-B-16-SigLIP") == tokenizer | {"context_length": 64}


def test_build_from_names_and_configs() -> None:
    config = our_config(shrunk_config("ViT-B-32"))
    for given in (config, config.model_dump()):
        module, info = build(given)
        assert isinstance(module, CLIP) and module.config == config
        assert info["preprocess"] == {"size": 64} and info["tokenizer"] == CLIP_TOKENIZER
    with pytest.raises(MmbaseError, match=r"model config, vision.layres: there is no such key; did you mean 'layers'"):
        build({"vision": {"layres": 3}})
    with pytest.raises(MmbaseError, match="does not divide"):
        build({"vision": {"heads": 7}})
    with pytest.raises(MmbaseError, match="unknown model"):
        build("VitB")


def test_exported_files_hold_contiguous_fp32(folder: Path) -> None:
    assert all(
        t.is_contiguous() and t.dtype == torch.float32
        for t in load_file(folder / "open_clip_model.safetensors").values()
    )
