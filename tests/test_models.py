"""Models: shapes, named variants, the normaliser inside, errors."""

import pytest
import torch
from torch import nn

from derkit.errors import DerkitError
from derkit.models import MODELS, OPTIONS, Normalize, PreActBlock, build_model, count_parameters, describe, same_network

SMALL = {"small_cnn": dict(width=2), "preact_resnet18": dict(width=2), "wide_resnet": dict(width=1, depth=10)}


def names(model):
    return set(model.state_dict())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("channels, size, classes", [(1, 28, 10), (3, 32, 100), (3, 20, 2)])
def test_output_shape(name, channels, size, classes):
    model = build_model(name, channels, classes, size, **SMALL[name])
    x = torch.rand(3, channels, size, size)
    assert model(x).shape == (3, classes)
    assert model.double()(x.double()).dtype == torch.float64


def test_published_sizes():
    """Parameter counts: 92k (small_cnn), 11.17 M (PreActResNet-18), 36.5 M (WRN-28-10)."""
    assert 90_000 < count_parameters(build_model("small_cnn", 1, 10, 28)) < 94_000
    with torch.device("meta"):
        resnet, wide = build_model("preact_resnet18", 3, 10, 32), build_model("wide_resnet", 3, 10, 32)
    assert count_parameters(resnet) == 11_172_170
    assert count_parameters(wide) == 36_479_194


def test_preact_variants_are_different_networks():
    """Final BN: more parameters. Shortcut: the same parameters, another function."""
    build = {
        (s, f): build_model("preact_resnet18", 3, 10, 32, width=4, shortcut=s, final_bn=f)
        for s in ("x", "bn")
        for f in (True, False)
    }
    assert count_parameters(build["x", True]) - count_parameters(build["x", False]) == 2 * 32
    assert {k for k in names(build["x", True]) - names(build["x", False])} == {
        k for k in names(build["x", True]) if ".final." in k
    }
    assert names(build["x", True]) == names(build["bn", True])
    build["x", True].load_state_dict(build["bn", True].state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert not torch.allclose(build["x", True].eval()(x), build["bn", True].eval()(x))


@pytest.mark.parametrize("shortcut", ["x", "bn"])
def test_shortcut_by_hand(shortcut):
    """shortcut(x) or shortcut(relu(bn(x))), as the name says."""
    block = PreActBlock(2, 4, 2, shortcut).double().eval()
    nn.init.uniform_(block.bn1.weight), nn.init.uniform_(block.bn1.bias)
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    h = block.bn1(x).relu()
    body = block.conv2(block.bn2(block.conv1(h)).relu())
    torch.testing.assert_close(block(x), body + block.project(x if shortcut == "x" else h))
    plain = PreActBlock(2, 2, 1, shortcut).double().eval()
    assert plain.project is None
    torch.testing.assert_close(plain(x), x + plain.conv2(plain.bn2(plain.conv1(plain.bn1(x).relu())).relu()))


def test_small_cnn_without_bn():
    model = build_model("small_cnn", 1, 10, 28, width=2, bn=False)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_small_cnn_has_no_strides():
    """A strided early layer prints a checkerboard into the input gradient."""
    convolutions = [m for m in build_model("small_cnn", 1, 10, 28).modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 4 and all(m.stride == (1, 1) for m in convolutions)


@pytest.mark.parametrize("depth", [11, 17, 27, 4, 9])
def test_wide_resnet_depth(depth):
    with pytest.raises(DerkitError, match="6n \\+ 4"):
        build_model("wide_resnet", 3, 10, 32, depth=depth, width=1)


def test_wide_resnet_depth_counts_convolutions():
    for depth in (10, 16):
        model = build_model("wide_resnet", 3, 10, 32, depth=depth, width=1)
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert len(convolutions) == depth - 3  # the published depth also counts the head and two of the projections


def test_normaliser_is_inside():
    """(x - mean) / std happens in the model, so that eps stays in pixel units."""
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    model = build_model("small_cnn", 3, 10, 8, mean, std, width=2).eval()
    x = torch.rand(2, 3, 8, 8)
    by_hand = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(model[0](x), by_hand)
    torch.testing.assert_close(model(x), model[1](by_hand))
    assert isinstance(model[0], Normalize) and "0.mean" in names(model) and count_parameters(model[0]) == 0
    plain = build_model("small_cnn", 3, 10, 8, width=2)
    assert torch.equal(plain[0](x), x)


def test_spec_rebuilds_the_model():
    for name in MODELS:
        model = build_model(name, 3, 7, 32, [0.5] * 3, [0.2] * 3, **SMALL[name])
        again = build_model(**model.spec)
        again.load_state_dict(model.state_dict())
        assert describe(again.spec) == describe(model.spec)


def test_describe_names_the_variant():
    assert (
        describe(build_model("preact_resnet18", 3, 10, 32, width=2, shortcut="x", final_bn=False).spec)
        == "preact_resnet18(width=2, shortcut=x, final_bn=False)"
    )
    assert describe({"name": "custom"}) == "custom"


def test_same_network_fills_in_defaults():
    spec = build_model("preact_resnet18", 3, 10, 32, width=2).spec
    assert same_network(spec, spec | dict(shortcut="bn", final_bn=True)) and not same_network(
        spec, spec | dict(shortcut="x")
    )
    assert not same_network(spec, spec | dict(classes=9)) and same_network(spec, spec | dict(mean=[0.1] * 3))


def test_errors():
    with pytest.raises(DerkitError, match="Did you mean 'preact_resnet18'"):
        build_model("preactresnet18", 3, 10, 32)
    with pytest.raises(DerkitError, match="no option 'depth'; it has: width, bn"):
        build_model("small_cnn", 3, 10, 32, depth=10)
    with pytest.raises(DerkitError, match="shortcut"):
        build_model("preact_resnet18", 3, 10, 32, shortcut="a")
    with pytest.raises(DerkitError, match="one mean and std per channel"):
        build_model("small_cnn", 3, 10, 32, [0.5], [0.5])
    assert set(OPTIONS) == set(MODELS)
