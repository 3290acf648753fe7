"""Fusion: the same function after folding, on random parameters, because freshly initialised ones hide errors."""

import copy
import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from recipes.riformer.convert import convert, recognise
from recipes.riformer.model import MetaFormer, fuse

GOLDENS = Path(__file__).parent / "goldens" / "models"
LEVELS = ("norm", "full")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomised(model):
    """Every parameter away from where it starts: norms, biases, affine and layer scales of order one."""
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = math.prod(parameter.shape[1:])
            parameter.normal_(std=fan_in**-0.5)
    return model.eval()


def small(mixer="affine", **kwargs):
    return randomised(MetaFormer(mixer, (1, 2, 1), (8, 12, 20), 6, layer_scale_init=0.1, **kwargs))


def worst(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("scale", [0.1, False])
@pytest.mark.parametrize("mixer", ["affine", "identity"])
@pytest.mark.parametrize("level", LEVELS)
def test_fused_is_the_same_function(level, mixer, scale):
    model = randomised(MetaFormer(mixer, (1, 2, 1), (8, 12, 20), 6, layer_scale_init=scale))
    x = torch.randn(2, 3, 40, 48)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        assert worst(fuse(model, level)(x), model(x)) < 1e-5
        after = model.state_dict()
        assert model.form == "train" and all(stage.form == "train" for stage in model.stages)
        assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
        model, x = model.double(), x.double()
        fused = fuse(model, level)
        assert worst(fused(x), model(x)) < 1e-12
        for ours, theirs in zip(fused.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True):
            assert worst(ours, theirs) < 1e-12
    assert fused.form == level


@pytest.mark.parametrize("level", LEVELS)
def test_registered_model_of_full_depth(level):
    model = randomised(timm.create_model("riformer_micro", num_classes=10))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        fused = fuse(model, level)
        assert worst(fused(x), model(x)) < 1e-5
        assert worst(fuse(model.double(), level)(x.double()), model(x.double())) < 1e-12
    assert fused.pretrained_cfg == model.pretrained_cfg


def test_norm_level_reproduces_the_references_fusion():
    record = torch.load(GOLDENS / "riformer_small.pt", weights_only=True)
    arch = record["arch"]
    model = MetaFormer("affine", arch["depths"], arch["dims"], arch["num_classes"]).eval()
    model.load_state_dict(convert(record["state_dict"]))
    fused, expected = fuse(model), convert(record["deploy_state_dict"])
    state = fused.state_dict()
    assert set(state) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(state[name], value, rtol=1e-6, atol=1e-7), name
    with torch.no_grad():
        assert worst(fused(record["x"]), record["deploy_logits"]) < 1e-5
        assert worst(fuse(model, "full")(record["x"]), record["logits"]) < 1e-5


def test_formula_of_the_paper():
    """gamma' = gamma (s - 1), beta' = beta (s - 1) + t."""
    model = small().double()
    block, fused = model.stages[1].blocks[1], fuse(model).stages[1].blocks[1]
    s, t = block.token_mixer.affine.weight.flatten(), block.token_mixer.affine.bias
    assert torch.allclose(fused.norm_reparam.weight, block.norm1.weight * (s - 1), atol=1e-15)
    assert torch.allclose(fused.norm_reparam.bias, block.norm1.bias * (s - 1) + t, atol=1e-15)
    assert not hasattr(fused, "token_mixer") and not hasattr(fused, "norm1")


def test_full_from_norm_is_full():
    model = small()
    direct, twice = fuse(model, "full").state_dict(), fuse(fuse(model, "norm"), "full").state_dict()
    assert list(direct) == list(twice)
    assert all(torch.allclose(direct[name], twice[name], atol=1e-6) for name in direct)


def test_full_runs_linears_over_channels_last_tokens():
    fused, seen = fuse(small(), "full"), []
    assert {type(m) for m in fused.stages[1].blocks.modules()}.isdisjoint({nn.Conv2d, nn.GroupNorm})
    for stage in fused.stages:
        stage.blocks.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    x = torch.randn(2, 3, 40, 48)
    fused(x)
    assert [tuple(t.shape) for t in seen] == [(2, 10, 12, 8), (2, 5, 6, 12), (2, 3, 3, 20)]
    assert all(t.is_contiguous() for t in seen)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in fused.forward_intermediates(x)[1])
    assert fused.stem.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("level", LEVELS)
def test_a_fused_file_loads_into_its_form(level, tmp_path):
    model = randomised(timm.create_model("riformer_nano", num_classes=5))
    fused, x = fuse(model, level), torch.randn(2, 3, 28, 28)
    path = tmp_path / "fused.safetensors"
    save_file({name: value.contiguous() for name, value in fused.state_dict().items()}, path)
    again = timm.create_model("riformer_nano", num_classes=5, form=level).eval()
    again.load_state_dict(load_file(path))
    assert worst(again(x), fused(x)) < 1e-6
    assert recognise(path) == "kdlib MetaFormer, fused"
    again.load_state_dict(convert(path))


@pytest.mark.parametrize("level", LEVELS)
def test_fused_keeps_mode_dtype_and_shares_nothing(level):
    model = small(drop_path_rate=0.2).train().to(torch.bfloat16)
    fused = fuse(model, level)
    assert all(module.training for module in fused.modules())
    assert not any(module.training for module in fuse(copy.deepcopy(model).eval(), level).modules())
    assert all(p.dtype == torch.bfloat16 and not p.is_meta and p.requires_grad for p in fused.parameters())
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.fill_(7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert ("drop_path" in str(fused)) == (level == "norm")


def test_a_norm_of_another_eps_is_not_fused():
    model = small()
    model.stages[1].blocks[0].norm2.eps = 1e-3
    for level in LEVELS:
        with pytest.raises(ValueError, match=r"norm2 has eps 0.001, a fused block computes with 1e-05"):
            fuse(model, level)


def test_fused_keeps_what_is_frozen_and_what_is_dropped():
    model = small(drop_path_rate=0.3)
    model.stages[1].blocks[1].drop_path2.drop_prob = 0.9
    for frozen in (False, True):
        fused = fuse(model.requires_grad_(not frozen), "norm")
        assert all(parameter.requires_grad != frozen for parameter in fused.stages[1].parameters())
        assert fused.stages[1].blocks[1].drop_path2.drop_prob == 0.9


def test_norm_form_can_be_trained_on():
    fused = fuse(small(), "norm").train()
    fused(torch.randn(2, 3, 40, 48)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fused.parameters())


@pytest.mark.parametrize(
    ("make", "level", "message"),
    [
        (lambda: small(), "deploy", r"level is 'deploy'; expected one of 'norm', 'full'"),
        (lambda: nn.Linear(2, 2), "norm", r"takes a MetaFormer, but was given a Linear.*\.module"),
        (lambda: small("pool"), "norm", r"pooling mixer reads its neighbours.*form 'train'"),
        (lambda: small("pool"), "full", r"pooling mixer reads its neighbours.*form 'train'"),
        (lambda: fuse(small(), "norm"), "norm", r"already fused, form='norm'"),
        (lambda: fuse(small(), "full"), "norm", r"already fused, form='full'"),
        (lambda: fuse(small(), "full"), "full", r"already fused, form='full'"),
    ],
)
def test_what_cannot_be_fused_says_why(make, level, message):
    with pytest.raises(ValueError, match=message):
        fuse(make(), level)
