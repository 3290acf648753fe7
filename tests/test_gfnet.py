"""GFNetH: sizes, names and outputs of the reference; the filter against its slow definition; timm's expectations."""

import copy
import hashlib
import json
import re
from pathlib import Path

import pytest
import timm
import torch

from recipes.riformer.convert import convert
from recipes.riformer.gfnet import GFNetH, GlobalFilter
from recipes.riformer.resize import resize_state_dict

GOLDENS = Path(__file__).parent / "goldens" / "models"
COUNTS = json.loads((GOLDENS / "model_counts.json").read_text())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def close(ours, theirs, tolerance=1e-5):
    return (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def small(image_size=64, **kwargs):
    return GFNetH((1, 1, 2, 1), (16, 32, 48, 64), image_size, 10, **kwargs).eval()


def from_golden():
    record = torch.load(GOLDENS / "gfnet_h_small.pt", weights_only=True)
    model = small(record["arch"]["image_size"])
    model.load_state_dict(convert(record["state_dict"]))
    return model, record


def original_name(ours):
    name = ours.replace("stem.conv", "patch_embed.0.proj")
    name = re.sub(r"stages\.(\d)\.downsample\.conv", r"patch_embed.\1.proj", name)
    return re.sub(r"stages\.(\d)\.blocks", r"blocks.\1", name)


@pytest.mark.parametrize("name", [name for name in COUNTS if name.startswith("gfnet")])
def test_full_sizes_have_the_parameters_and_names_of_the_reference(name):
    expected = COUNTS[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    shapes = {original_name(k): "x".join(map(str, v.shape)) for k, v in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == expected["params"]
    assert len(shapes) == expected["tensors"]
    lines = "\n".join(sorted(shapes)), "\n".join(f"{k} {shapes[k]}" for k in sorted(shapes))
    assert [hashlib.sha256(text.encode()).hexdigest() for text in lines] == [
        expected["keys_sha256"],
        expected["keys_shapes_sha256"],
    ]


@pytest.mark.parametrize(("name", "scale"), [("ti", 1e-3), ("s", 1e-5), ("b", 1e-6), ("nano", 0.1), ("micro", 0.1)])
def test_layer_scale_of_each_size(name, scale):
    model = timm.create_model(f"gfnet_h_{name}")
    assert model.stages[1].blocks[0].gamma.unique().item() == pytest.approx(scale)


def test_outputs_of_the_reference():
    model, record = from_golden()
    filtered = []
    for stage in model.stages:
        stage.blocks[-1].filter.register_forward_hook(lambda _m, _i, output: filtered.append(output))
    with torch.no_grad():
        assert close(model(record["x"]), record["logits"])
        filtered_once = filtered[:]
        final, features = model.forward_intermediates(record["x"], output_fmt="NLC")
    assert len(features) == len(record["features"]) == len(filtered_once) == 4
    for ours, theirs in zip(features + filtered_once, record["features"] + record["mixer_outputs"], strict=True):
        assert ours.shape == theirs.shape and close(ours, theirs)
    assert torch.equal(final, model.norm(features[-1]))


@pytest.mark.parametrize("grid", [(7, 7), (4, 6), (5, 2), (1, 1)])
def test_filter_is_a_circular_convolution(grid):
    """y[i, j] = sum over (a, b) of kernel[a, b] x[i - a, j - b], indices modulo the grid; kernel = irfft2(weight)."""
    height, width = grid
    kernel, x = torch.randn(height, width, 3, dtype=torch.double), torch.randn(2, height, width, 3, dtype=torch.double)
    mixer = GlobalFilter(3, grid).double()
    mixer.complex_weight.data = torch.view_as_real(torch.fft.rfft2(kernel, dim=(0, 1)).contiguous())
    expected = torch.zeros_like(x)
    for a in range(height):
        for b in range(width):
            expected += kernel[a, b] * x.roll((a, b), (1, 2))
    assert torch.allclose(mixer(x.flatten(1, 2)), expected.flatten(1, 2), atol=1e-12)


def test_the_part_of_the_spectrum_that_no_real_kernel_has_does_nothing_here():
    model, record = from_golden()
    for stage in model.stages:
        for block in stage.blocks:
            weight, width = torch.view_as_complex(block.filter.complex_weight.data), stage.grid[1]
            for column in {0, width // 2} if width % 2 == 0 else {0}:
                mirrored = weight[:, column].roll(-1, 0).flip(0).conj()
                weight[:, column] = (weight[:, column] + mirrored) / 2
    with torch.no_grad():
        assert close(model(record["x"]), record["logits"])


@pytest.mark.parametrize("side", [28, 31, 64, (36, 50)])
def test_overlapping_patches_are_those_of_poolformer(side):
    """Grids of any parity, and weights that go from one size to another."""
    twin = timm.create_model("metaformer_pool_s12", dims=[8, 16], depths=[1, 1], num_classes=3)
    model = GFNetH((1, 1), (8, 16), side, 3, overlap=True).eval()
    images = torch.randn(2, 3, *model.image_size)
    for ours, theirs in ((model.stem, twin.stem), (model.stages[1].downsample, twin.stages[1].downsample)):
        ours.conv.load_state_dict(theirs.conv.state_dict())
    tokens, twins = model.stem(images), twin.stem(images)
    torch.testing.assert_close(tokens, twins.flatten(2).mT)
    assert model.stages[0].grid == twins.shape[2:]
    torch.testing.assert_close(
        model.stages[1].downsample(tokens), twin.stages[1].downsample(twins).flatten(2).mT, rtol=1e-5, atol=1e-6
    )
    assert model(images).shape == (2, 3)
    larger = GFNetH((1, 1), (8, 16), 95, 3, overlap=True)
    larger.load_state_dict(resize_state_dict(model.state_dict(), larger, side))


def test_filter_stays_in_float32_under_autocast_and_in_bfloat16():
    model, x = small(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    out.float().square().sum().backward()
    assert close(out.float(), expected, 0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    mixer, tokens = GlobalFilter(8, (7, 7)), torch.randn(2, 49, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mixer(tokens), mixer(tokens.float()).bfloat16())


def test_another_image_size_names_both():
    with pytest.raises(ValueError, match=r"\(64, 64\).*\(64, 48\).*resize_state_dict"):
        small()(torch.randn(1, 3, 64, 48))
    with pytest.raises(ValueError, match=r"\(28, 28\) is too small for 4 stages"):
        small(28)
    with pytest.raises(ValueError, match="one entry per stage"):
        GFNetH((1, 2), (8,))


def test_oblong_images():
    model = small((64, 96)).eval()
    features = model.forward_intermediates(torch.randn(1, 3, 64, 96), intermediates_only=True)
    assert [tuple(f.shape[1:]) for f in features] == [(16, 16, 24), (32, 8, 12), (48, 4, 6), (64, 2, 3)]


def test_resize_state_dict():
    source = small(64)
    state = source.state_dict()
    same = resize_state_dict(state, source, 64)
    assert all(same[name] is value for name, value in state.items())
    state["stages.0.blocks.0.filter.complex_weight"] = torch.ones(16, 9, 16, 2) * torch.tensor([2.0, -1.0])
    state["pos_embed"] = torch.arange(16.0).repeat(256, 1)[None] + torch.arange(16.0).repeat_interleave(16)[:, None]
    target = small((96, 64))
    resized = resize_state_dict(state, target, 64)
    target.load_state_dict(resized)
    weight = resized["stages.0.blocks.0.filter.complex_weight"]
    assert weight.shape == (24, 9, 16, 2)
    assert torch.allclose(weight, torch.tensor([2.0, -1.0]).expand_as(weight))
    ends = [0, -1]  # align_corners: the first and the last frequency stay where they are
    for name in ("stages.1.blocks.0.filter.complex_weight", "stages.2.blocks.1.filter.complex_weight"):
        assert torch.allclose(resized[name][ends], state[name][ends], atol=1e-6)
    rows = resized["pos_embed"].unflatten(1, (24, 16))[0]
    assert torch.allclose(rows - rows[..., :1], torch.arange(16.0).expand_as(rows), atol=1e-4)
    assert (rows[1:, 0, 0] > rows[:-1, 0, 0]).all() and torch.equal(rows[:, :1].expand_as(rows), rows)
    assert target(torch.randn(1, 3, 96, 64)).isfinite().all()
    with pytest.raises(ValueError, match=r"256 positions.*576"):
        resize_state_dict(state, target, 96)


def test_registry_config_and_image_size():
    model = timm.create_model("gfnet_h_nano", in_chans=1, num_classes=5, image_size=32)
    assert model.image_size == (32, 32) and model.pretrained_cfg["input_size"] == (1, 32, 32)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    assert timm.create_model("gfnet_h_nano", img_size=36).image_size == (36, 36)
    nano = timm.create_model("gfnet_h_nano")
    assert [stage.grid for stage in nano.stages] == [(7, 7), (3, 3)]
    assert nano.pretrained_cfg["fixed_input_size"] and nano.pretrained_cfg["input_size"] == (3, 28, 28)
    assert nano.get_submodule(nano.pretrained_cfg["first_conv"]) is nano.stem.conv
    assert timm.create_model("gfnet_h_micro")(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    with pytest.raises(ValueError, match=r"gfnet_h_b: no weights are published.*convert"):
        timm.create_model("gfnet_h_b", pretrained=True)


def test_features_head_and_classifier():
    model, x = small(drop_rate=0.5), torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, 4, 64)
    assert torch.equal(model.forward_head(features), model(x))
    assert torch.equal(model.forward_head(features, pre_logits=True), features.mean(1))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.get_classifier().out_features == model.num_classes == 3
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    with pytest.raises(ValueError, match="needs global_pool"):
        model.reset_classifier(3)


def test_features_only():
    backbone = timm.create_model("gfnet_h_micro", features_only=True, out_indices=(1, 2))
    features = backbone(torch.randn(1, 3, 64, 64))
    assert [tuple(f.shape[1:]) for f in features] == [(64, 8, 8), (160, 4, 4)]
    assert backbone.feature_info.channels() == [64, 160] and backbone.feature_info.reduction() == [8, 16]
    assert not any(name.startswith(("model.norm", "model.head", "model.stages.3")) for name in backbone.state_dict())


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, x = small(), torch.randn(2, 3, 64, 64)
    frugal = copy.deepcopy(plain)
    frugal.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in frugal.stages)
    for model in (plain, frugal):
        model(x).square().sum().backward()
    for ours, theirs in zip(frugal.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and torch.allclose(ours.grad, theirs.grad, atol=1e-7)


def test_channels_last_and_compile():
    model, x = small(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    torch._dynamo.reset()
    assert close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
    model = model.to(memory_format=torch.channels_last)
    assert close(model(x.to(memory_format=torch.channels_last)), expected)


def test_weight_decay_spares_the_position_embedding_and_gamma_can_be_absent():
    assert GFNetH((1,), (8,), 16).no_weight_decay() == {"pos_embed"}
    model = GFNetH((1,), (8,), 16, 2, layer_scale_init=None)
    assert "stages.0.blocks.0.gamma" not in model.state_dict()
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 2)
    zero = GFNetH((1,), (8,), 16, 2, layer_scale_init=0)
    tokens = torch.randn(1, 16, 8)
    assert torch.equal(zero.stages(tokens), tokens)


@pytest.mark.slow
def test_the_filter_survives_inductor_in_value_and_gradient():
    """Older Inductors got the gradient of a complex product wrong; the filter multiplies in real numbers."""
    torch.manual_seed(0)
    net = timm.create_model("gfnet_h_nano", num_classes=5)
    images = torch.randn(2, 3, 28, 28)
    plain = net(images)
    plain.square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    compiled = torch.compile(net, fullgraph=True)(images)
    compiled.square().sum().backward()
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
