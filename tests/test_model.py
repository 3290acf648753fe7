"""MetaFormer: sizes and names of the references, their outputs, and what timm expects of a model."""

import copy
import hashlib
import json
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from recipes.riformer.convert import convert
from recipes.riformer.model import MetaFormer

GOLDENS = Path(__file__).parent / "goldens" / "models"
COUNTS = json.loads((GOLDENS / "model_counts.json").read_text())
FAMILIES = ("riformer", "metaformer_pool", "metaformer_id")
SMALL = {"riformer_small": "affine", "poolformer_small": "pool", "metaformer_id_small": "identity"}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def golden(name):
    return torch.load(GOLDENS / f"{name}.pt", weights_only=True)


def close(ours, theirs, tolerance=1e-5):
    return (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def from_golden(name, state="state_dict", form="train"):
    """The small model of a golden file, loaded strictly."""
    record = golden(name)
    arch = record["arch"]
    model = MetaFormer(SMALL[name], arch["depths"], arch["dims"], arch["num_classes"], form=form)
    model.load_state_dict(convert(record[state]))
    return model.eval(), record


def nano(family="riformer", **kwargs):
    return timm.create_model(f"{family}_nano", num_classes=5, **kwargs)


def original_name(ours, mmpretrain):
    """Our parameter name as the reference spells it, written down independently of convert.py."""
    name = re.sub(r"layer_scale(\d)\.scale", r"layer_scale_\1", ours)
    name = name.replace("stem.conv", "patch_embed.proj")
    name = re.sub(r"stages\.(\d)\.downsample\.conv", lambda m: f"network.{2 * int(m[1]) - 1}.proj", name)
    name = re.sub(r"stages\.(\d)\.blocks\.(\d+)", lambda m: f"network.{2 * int(m[1])}.{m[2]}", name)
    if not mmpretrain:
        return name
    return (
        name.replace("head.", "head.fc.") if name.startswith("head") else f"backbone.{re.sub('^norm', 'norm6', name)}"
    )


def hashes(state, mmpretrain):
    shapes = {original_name(k, mmpretrain): "x".join(map(str, v.shape)) for k, v in state.items()}
    lines = "\n".join(sorted(shapes)), "\n".join(f"{k} {shapes[k]}" for k in sorted(shapes))
    return [hashlib.sha256(text.encode()).hexdigest() for text in lines]


@pytest.mark.parametrize("name", [name for name in COUNTS if not name.startswith("gfnet")])
def test_full_sizes_have_the_parameters_and_names_of_the_reference(name):
    expected = COUNTS[name]
    ours = re.sub("_(train|deploy)$", "", name).replace("poolformer", "metaformer_pool")
    with torch.device("meta"):
        model = timm.create_model(ours, form="norm" if name.endswith("_deploy") else "train")
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == expected["params"]
    assert len(state) == expected["tensors"]
    assert hashes(state, "riformer" in name) == [expected["keys_sha256"], expected["keys_shapes_sha256"]]
    assert model.stages[0].blocks[0].args.layer_scale_init == expected["layer_scale_init"]


@pytest.mark.parametrize("name", SMALL)
def test_outputs_of_the_reference(name):
    model, record = from_golden(name)
    mixed = []
    for stage in model.stages:
        stage.blocks[-1].token_mixer.register_forward_hook(lambda _m, _i, output: mixed.append(output))
    with torch.no_grad():
        assert close(model(record["x"]), record["logits"])
        mixed_once = mixed[:]
        final, features = model.forward_intermediates(record["x"])
    assert len(features) == len(record["features"]) == len(mixed_once) == 4
    for ours, theirs in zip(features + mixed_once, record["features"] + record["mixer_outputs"], strict=True):
        assert close(ours, theirs)
    assert torch.equal(final, model.norm(features[-1]))


def test_deploy_form_of_the_reference():
    model, record = from_golden("riformer_small", "deploy_state_dict", "norm")
    with torch.no_grad():
        assert close(model(record["x"]), record["deploy_logits"])


def test_head_order_is_the_papers_not_timms():
    model, record = from_golden("poolformer_small")
    with torch.no_grad():
        assert not close(model(record["x"]), record["timm_logits"], 0.1)


@pytest.mark.parametrize(
    ("init", "low", "high", "shift"),
    [("trunc_normal", -0.2, 0.2, 0.0), ("uniform", -1, 1, None), ("zero_branch", 1, 1, 0)],
)
def test_affine_init(init, low, high, shift):
    affine = nano(affine_init=init).stages[1].blocks[1].token_mixer.affine
    assert affine.weight.min() >= low and affine.weight.max() <= high
    assert affine.weight.std() == 0 if init == "zero_branch" else affine.weight.std() > 0.01
    assert affine.bias.std() > 0.3 if shift is None else bool((affine.bias == shift).all())


def test_initialisation_leaves_convolutions_to_pytorch_and_narrows_the_mlp():
    model = nano(drop_path_rate=0.3)
    stem, fc = model.stem.conv, model.stages[1].blocks[0].mlp.fc1
    assert stem.bias.abs().max() > 0 and stem.weight.abs().max() <= (3 * 49) ** -0.5
    assert fc.weight.std().item() == pytest.approx(0.02, rel=0.1) and fc.bias.abs().max() == 0
    rates = [(b.drop_path1.drop_prob, b.drop_path2.drop_prob) for s in model.stages for b in s.blocks]
    assert rates == [(pytest.approx(r), pytest.approx(r)) for r in (0, 0.1, 0.2, 0.3)]


def test_without_layer_scale_and_with_one_of_zero():
    plain, zero = nano(layer_scale_init=False), nano(layer_scale_init=0)
    assert not any("layer_scale" in name for name in plain.state_dict())
    assert all((v == 0).all() for k, v in zero.state_dict().items() if "layer_scale" in k)
    assert not any(
        "layer_scale" in name for name in MetaFormer(depths=(1,), dims=(8,), layer_scale_init=None).state_dict()
    )
    x = torch.randn(2, 3, 28, 28)
    assert plain(x).shape == (2, 5)
    assert torch.equal(zero.stages[0].blocks(zero.stem(x)), zero.stem(x))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"token_mixer": "attention"}, ("attention", "affine", "pool", "identity")),
        ({"affine_init": "ones"}, ("ones", "zero_branch")),
        ({"form": "deploy"}, ("deploy", "norm", "full")),
        ({"token_mixer": "pool", "form": "norm"}, ("pooling", "train")),
        ({"depths": (1, 2)}, ("(1, 2)", "one entry per stage")),
        ({"global_pool": "max"}, ("max", "avg")),
        ({"global_pool": ""}, ("global_pool", "avg")),
    ],
)
def test_wrong_arguments_say_what_was_expected(kwargs, words):
    with pytest.raises(ValueError, match=r"expected|need|exist") as error:
        MetaFormer(**kwargs)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("family", FAMILIES)
def test_timm_registry_and_config(family):
    assert {f"{family}_{size}" for size in ("s12", "s24", "s36", "m36", "m48", "nano", "micro")} <= set(
        timm.list_models(f"{family}_*")
    )
    small, big = nano(family, in_chans=1), timm.models.get_pretrained_cfg(f"{family}_m48")
    assert small(torch.randn(2, 1, 28, 28)).shape == (2, 5)
    assert small.pretrained_cfg["input_size"] == (3, 28, 28)
    assert (big.input_size, big.crop_pct, big.interpolation) == ((3, 224, 224), 0.95, "bicubic")
    assert timm.models.get_pretrained_cfg(f"{family}_s36").crop_pct == 0.9
    for layer in (small.pretrained_cfg["first_conv"], small.pretrained_cfg["classifier"]):
        assert isinstance(small.get_submodule(layer), nn.Conv2d | nn.Linear)
    with pytest.raises(ValueError, match=r"no weights are published.*convert"):
        timm.create_model(f"{family}_nano", pretrained=True)


def test_micro_is_made_for_64_pixels():
    model = timm.create_model("riformer_micro").eval()
    assert [
        tuple(f.shape[1:]) for f in model.forward_intermediates(torch.randn(1, 3, 64, 64), intermediates_only=True)
    ] == [
        (32, 16, 16),
        (64, 8, 8),
        (160, 4, 4),
        (256, 2, 2),
    ]


def test_features_head_and_classifier():
    model, x = nano().eval(), torch.randn(2, 3, 28, 28)
    features = model.forward_features(x)
    assert features.shape == (2, 96, 4, 4)
    assert torch.equal(model.forward_head(features), model(x))
    assert torch.equal(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
    assert model.get_classifier() is model.head
    model.double().reset_classifier(7)
    assert model(x.double()).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0)
    assert torch.equal(model(x.double()), model.forward_features(x.double()).mean((2, 3)))
    model.reset_classifier(0, "")
    assert model(x.double()).shape == (2, 96, 4, 4)


@pytest.mark.parametrize("form", ["train", "norm", "full"])
def test_features_only(form):
    torch.manual_seed(0)
    model = timm.create_model("riformer_micro", form=form).eval()
    torch.manual_seed(0)
    backbone = timm.create_model("riformer_micro", form=form, features_only=True, out_indices=(0, 2)).eval()
    x = torch.randn(1, 3, 64, 64)
    features = backbone(x)
    assert backbone.feature_info.channels() == [f.shape[1] for f in features] == [32, 160]
    assert backbone.feature_info.reduction() == [64 // f.shape[2] for f in features] == [4, 16]
    expected = model.forward_intermediates(x, indices=[0, 2], stop_early=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    assert not any(name.startswith(("model.norm", "model.head", "model.stages.3")) for name in backbone.state_dict())


def test_intermediates():
    model, x = nano().eval(), torch.randn(1, 3, 28, 28)
    last, (only,) = model.forward_intermediates(x, indices=1, norm=True)
    assert torch.equal(last, only) and torch.equal(last, model.forward_features(x))
    first, (same,) = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert torch.equal(first, same) and first.shape == (1, 48, 7, 7)
    with pytest.raises(ValueError, match="NHWC"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family):
    plain, x = nano(family), torch.randn(2, 3, 28, 28)
    frugal = copy.deepcopy(plain)
    frugal.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in frugal.stages)
    for model in (plain, frugal):
        model(x).square().sum().backward()
    for ours, theirs in zip(frugal.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and torch.allclose(ours.grad, theirs.grad, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_last(family):
    model, x = nano(family).eval(), torch.randn(2, 3, 28, 28)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    assert close(model(x.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family):
    model, x = nano(family), torch.randn(2, 3, 28, 28)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    assert out.isfinite().all() and close(out.float(), model(x), 0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("form", ["train", "norm", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_as_one_graph(family, form):
    if family == "metaformer_pool" and form != "train":
        pytest.skip("pooling has one form")
    model, x = nano(family, form=form).eval(), torch.randn(2, 3, 28, 28)
    torch._dynamo.reset()
    assert close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@pytest.mark.slow
def test_compiles_with_inductor():
    model, x = nano(drop_path_rate=0.0), torch.randn(2, 3, 28, 28)
    torch._dynamo.reset()
    assert close(torch.compile(model, fullgraph=True)(x), model(x), 1e-4)


def test_pickle_keeps_the_model_whole():
    model, x = nano(drop_path_rate=0.1).eval(), torch.randn(1, 3, 28, 28)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize("name", ["riformer_nano", "gfnet_h_nano"])
def test_layer_groups_for_layerwise_learning_rates(name):
    import recipes.riformer.gfnet  # noqa: F401

    model = timm.create_model(name)
    groups = timm.models.group_parameters(model, model.group_matcher())
    sizes = [len(names) for _, names in sorted(groups.items())]
    assert sum(sizes) == len(list(model.parameters()))
    assert len(sizes) == 6  # stem, 2 + 2 blocks (with the downsampling before, the norm behind), head
