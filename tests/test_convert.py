"""Converter: every source recognised and renamed by value, unknown ones refused with a list, files read safely."""

import logging
import os
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from recipes.riformer.convert import SOURCES, convert, recognise
from recipes.riformer.gfnet import GFNetH
from recipes.riformer.model import MetaFormer

GOLDENS = Path(__file__).parent / "goldens" / "models"
FROM = {
    ("riformer_small", "state_dict"): "mmpretrain RIFormer, training form",
    ("riformer_small", "deploy_state_dict"): "mmpretrain RIFormer, deploy form",
    ("poolformer_small", "state_dict"): "PoolFormer or MetaFormer of sail-sg",
    ("metaformer_id_small", "state_dict"): "PoolFormer or MetaFormer of sail-sg",
    ("gfnet_h_small", "state_dict"): "GFNet-H of raoyongming",
}


def checkpoint(name, key="state_dict"):
    return torch.load(GOLDENS / f"{name}.pt", weights_only=True)[key]


def empty_model(name, key):
    depths, dims = (1, 1, 2, 1), (16, 32, 48, 64) if name.startswith("gfnet") else (16, 24, 32, 48)
    if name.startswith("gfnet"):
        return GFNetH(depths, dims, 64, 10)
    mixer = {"r": "affine", "p": "pool", "m": "identity"}[name[0]]
    return MetaFormer(mixer, depths, dims, 10, form="norm" if key.startswith("deploy") else "train")


@pytest.mark.parametrize(("file", "source"), FROM.items())
def test_sources_are_recognised_and_load_strictly(file, source, caplog):
    given = checkpoint(*file)
    with caplog.at_level(logging.INFO):
        state = convert(given)
    assert recognise(given) == source and source in caplog.text
    model = empty_model(*file)
    model.load_state_dict(state, strict=True)
    bare = given.get("state_dict", given.get("model", given))
    assert len(state) == len(bare)
    assert {id(value) for value in state.values()} == {id(value) for value in bare.values()}


def test_every_key_goes_where_it_belongs():
    given = checkpoint("riformer_small")["state_dict"]
    state = convert(given)
    assert set(state) == set(empty_model("riformer_small", "state_dict").state_dict())
    for ours, theirs in {
        "stem.conv.weight": "backbone.patch_embed.proj.weight",
        "stages.2.blocks.1.layer_scale2.scale": "backbone.network.4.1.layer_scale_2",
        "stages.2.blocks.1.layer_scale1.scale": "backbone.network.4.1.layer_scale_1",
        "stages.3.blocks.0.token_mixer.affine.bias": "backbone.network.6.0.token_mixer.affine.bias",
        "stages.1.blocks.0.norm1.bias": "backbone.network.2.0.norm1.bias",
        "stages.1.downsample.conv.bias": "backbone.network.1.proj.bias",
        "stages.3.downsample.conv.weight": "backbone.network.5.proj.weight",
        "norm.bias": "backbone.norm6.bias",
        "head.weight": "head.fc.weight",
    }.items():
        assert state[ours] is given[theirs]


def test_poolformer_starts_a_riformer_with_all_but_the_affine():
    """Guideline 5 of the paper."""
    student = empty_model("riformer_small", "state_dict")
    missing, unexpected = student.load_state_dict(convert(checkpoint("poolformer_small")), strict=False)
    assert not unexpected
    assert missing and all(".token_mixer.affine." in name for name in missing)


def test_timm_poolformer_has_the_same_blocks():
    """timm's own model, with random weights: equal stage outputs; the logits differ by the order of the head."""
    torch.manual_seed(0)
    theirs = timm.create_model("poolformer_s12", num_classes=4).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert recognise(theirs.state_dict()) == "PoolFormer of timm"
    ours = timm.create_model("metaformer_pool_s12", num_classes=4).eval()
    ours.load_state_dict(convert(theirs.state_dict()))
    assert torch.equal(ours.norm.weight, theirs.head.norm.weight) and torch.equal(ours.head.bias, theirs.head.fc.bias)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(ours.forward_intermediates(x)[1], theirs.forward_intermediates(x)[1], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize(
    ("name", "kwargs", "source"),
    [
        ("riformer_nano", {}, "kdlib MetaFormer, training form"),
        ("metaformer_pool_nano", {}, "kdlib MetaFormer, training form"),
        ("riformer_nano", {"form": "norm"}, "kdlib MetaFormer, fused"),
        ("riformer_nano", {"form": "full"}, "kdlib MetaFormer, fused"),
        ("gfnet_h_nano", {}, "kdlib GFNetH"),
    ],
)
def test_our_own_files_come_back_unchanged(name, kwargs, source, tmp_path):
    model = timm.create_model(name, **kwargs)
    state = model.state_dict()
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.pth")
    save_file(state, tmp_path / "last.safetensors")
    for path in (
        tmp_path / "last.pth",
        str(tmp_path / "last.safetensors"),
        {f"module._orig_mod.{k}": v for k, v in state.items()},
    ):
        assert recognise(path) == source
        again = convert(path)
        assert set(again) == set(state) and all(torch.equal(again[key], state[key]) for key in state)


def test_files_and_wrappers(tmp_path):
    given = checkpoint("riformer_small")["state_dict"]
    expected = convert(given)
    torch.save({"state_dict": given, "meta": {"mmpretrain_version": "1"}}, tmp_path / "wrapped.pth")
    torch.save(given | {"data_preprocessor.mean": torch.zeros(3)}, tmp_path / "bare.pt")
    torch.save({"model": given}, tmp_path / "model.pth.tar")
    for path in tmp_path.iterdir():
        state = convert(path)
        assert set(state) == set(expected) and all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_unknown_is_an_error_that_lists_what_was_expected(name):
    state = timm.create_model(name).state_dict()
    with pytest.raises(ValueError, match=re.escape(next(iter(state)))) as error:
        convert(state)
    for source in SOURCES:
        assert f"{source.name}: {', '.join(source.marks)}" in str(error.value)


def test_another_variant_of_a_known_architecture_names_the_key():
    state = checkpoint("poolformer_small") | {"network.4.0.token_mixer.qkv.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"sail-sg, but has the key 'network\.4\.0\.token_mixer\.qkv\.weight'"):
        convert(state)
    state = timm.create_model("poolformerv2_s12").state_dict()
    with pytest.raises(ValueError, match=r"PoolFormer of timm, but has the key 'stem\.norm\.weight'"):
        convert(state)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "0 tensors, first keys: none"),
        ({"epoch": 3}, r"'epoch' holds a int.*'state_dict', 'model'"),
        ([1, 2], "given a list"),
    ],
)
def test_what_is_no_state_dict(given, message):
    with pytest.raises(ValueError, match=message):
        convert(given)


class Malicious:
    """Unpickling this would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_is_run_from_a_file(tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "bad.pth"
    torch.save({"state_dict": {}, "meta": Malicious(trace)}, path)
    with pytest.raises(ValueError, match=r"bad\.pth.*could run code.*refused"):
        convert(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the file is harmless, so this test shows nothing"


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_missing_and_damaged_files_are_one_clear_line(tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    with pytest.raises(FileNotFoundError, match=rf"no checkpoint at .*weights\.{suffix}"):
        convert(path)
    state = checkpoint("poolformer_small")
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"<html>not found</html>", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"weights\.{suffix}.*download it again") as error:
            convert(path)
        assert "\n" not in str(error.value)
