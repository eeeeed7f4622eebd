"""Models: shapes, the published networks by their arithmetic, the normaliser inside, errors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from derkit.models import MODELS, OPTIONS, build_model, describe, same_network
from derkit.util import DerkitError

SMALL = {
    "one_layer": dict(filters=2),
    "small_cnn": dict(width=2),
    "preact_resnet18": dict(width=2),
    "wide_resnet": dict(width=1, depth=10),
}


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("channels, size, classes", [(1, 28, 10), (3, 32, 100), (3, 20, 2)])
def test_output_shape(name, channels, size, classes):
    model = build_model(name, channels, classes, size, **SMALL[name])
    x = torch.rand(3, channels, size, size)
    assert model(x).shape == (3, classes)
    assert model.double()(x.double()).dtype == torch.float64


def test_published_sizes():
    """92k parameters (small_cnn), 11.17 M (PreActResNet-18), 36.5 M (WRN-28-10)."""
    assert count_parameters(build_model("one_layer", 1, 10, 28)) == 4 * 10 + 10 * (4 * 784 + 1)
    assert 90_000 < count_parameters(build_model("small_cnn", 1, 10, 28)) < 94_000
    with torch.device("meta"):
        resnet = build_model("preact_resnet18", 3, 10, 32)
        wide = build_model("wide_resnet", 3, 10, 32)
    assert count_parameters(resnet) == 11_172_170
    assert count_parameters(wide) == 36_479_194


def published_forward(w, x, shortcut, final_bn):
    """The forward pass of preactresnet.py in the published code, from the weights w by name.

    Rice et al. project the activation (bn), Wong et al. and GradAlign x itself; GradAlign has no
    BatchNorm before the pooling."""

    def bn(h, name):
        parts = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (w[f"{name}.{part}"] for part in parts)
        return F.batch_norm(h, mean, var, weight, bias, training=False, eps=1e-5)

    out = F.conv2d((x - w["0.mean"]) / w["0.std"], w["1.stem.weight"], padding=1)
    for i, stride in enumerate([1, 1, 2, 1, 2, 1, 2, 1]):
        block, skip = f"1.body.{i}", out
        activation = F.relu(bn(out, f"{block}.bn1"))
        if stride == 2:
            source = activation if shortcut == "bn" else out
            skip = F.conv2d(source, w[f"{block}.project.weight"], stride=2)
        out = F.conv2d(activation, w[f"{block}.conv1.weight"], stride=stride, padding=1)
        out = F.conv2d(F.relu(bn(out, f"{block}.bn2")), w[f"{block}.conv2.weight"], padding=1)
        out = out + skip
    if final_bn:
        out = F.relu(bn(out, "1.final.0"))
    out = F.avg_pool2d(out, 4).flatten(1)
    return F.linear(out, w["1.head.weight"], w["1.head.bias"])


@pytest.mark.parametrize("final_bn", [True, False])
@pytest.mark.parametrize("shortcut", ["bn", "x"])
def test_preact_resnet_is_the_published_network(shortcut, final_bn, seeded):
    options = dict(mean=[0.49, 0.48, 0.45], std=[0.2, 0.25, 0.3], width=8)
    options |= dict(shortcut=shortcut, final_bn=final_bn)
    model, rng = build_model("preact_resnet18", 3, 10, 32, **options).double().eval(), seeded()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(generator=rng)
            m.running_var.uniform_(0.5, 2, generator=rng)
            nn.init.uniform_(m.weight, 0.5, 1.5, generator=rng)
            nn.init.normal_(m.bias, generator=rng)
    x = torch.rand(4, 3, 32, 32, generator=rng, dtype=torch.float64)
    expected = published_forward(model.state_dict(), x, shortcut, final_bn)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    assert ("1.final.0.weight" in model.state_dict()) == final_bn
    assert expected.std(0).min() > 1e-6  # the network sees the images, far above 1e-10


def test_small_cnn():
    """No strides: a strided early layer prints a checkerboard into the input gradient."""
    layers = list(build_model("small_cnn", 1, 10, 28, width=2, bn=False).modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in layers)
    convolutions = [m for m in layers if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 4 and all(m.stride == (1, 1) for m in convolutions)


def test_normaliser_is_inside():
    """(x - mean) / std happens in the model, so that eps stays in pixel units."""
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    model = build_model("small_cnn", 3, 10, 8, mean, std, width=2).eval()
    x = torch.rand(2, 3, 8, 8)
    by_hand = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(model[0](x), by_hand)
    torch.testing.assert_close(model(x), model[1](by_hand))
    assert "0.mean" in model.state_dict() and count_parameters(model[0]) == 0
    assert torch.equal(build_model("small_cnn", 3, 10, 8, width=2)[0](x), x)


@pytest.mark.parametrize("name", MODELS)
def test_spec_rebuilds_the_model(name):
    model = build_model(name, 3, 7, 32, [0.5] * 3, [0.2] * 3, **SMALL[name])
    again = build_model(**model.spec)
    again.load_state_dict(model.state_dict())
    assert describe(again.spec) == describe(model.spec)
    assert set(SMALL[name]) <= set(OPTIONS[name])


def test_specs_in_words_and_compared():
    spec = build_model("preact_resnet18", 3, 10, 32, width=2, shortcut="x", final_bn=False).spec
    assert describe(spec) == "preact_resnet18(width=2, shortcut=x, final_bn=False)"
    assert describe({"name": "custom"}) == "custom"
    plain = build_model("preact_resnet18", 3, 10, 32, width=2).spec
    assert same_network(plain, plain | dict(shortcut="bn", final_bn=True, mean=[0.1] * 3))
    assert not same_network(plain, spec) and not same_network(plain, plain | dict(classes=9))


@pytest.mark.parametrize("name, options, message", [
    ("preactresnet18", {}, "Did you mean 'preact_resnet18'"),
    ("small_cnn", dict(depth=10), "no option 'depth'; it has: width, bn"),
    ("preact_resnet18", dict(shortcut="a"), "shortcut must be 'x' or 'bn'"),
    ("small_cnn", dict(mean=[0.5], std=[0.5]), "one mean and std per channel"),
    *[("wide_resnet", dict(depth=depth), r"6n \+ 4") for depth in (4, 9, 11, 27)],
])  # fmt: skip
def test_errors(name, options, message):
    with pytest.raises(DerkitError, match=message):
        build_model(name, 3, 10, 32, **options)
