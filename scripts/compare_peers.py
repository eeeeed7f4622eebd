"""The kit beside other packages on the same trained models: attacks, AutoAttack, distances.

    pip install -e ".[peers,eval]" && pip install --no-deps torchattacks
    python scripts/compare_peers.py                         # writes figures/records/peers.json

Three networks are trained by `derkit.train` on the bundled data: standard, by PGD, and by FGSM with
DER. Every comparison is over the same images, the same model in float64 and, where a start is
drawn, the same number of steps. torchattacks pins an old `requests`, which does not go with
Jupyter: it is installed without its dependencies and left out where it is missing.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from derkit.attacks import fgsm, pgd
from derkit.config import TrainConfig
from derkit.data import Dataset, Split, load_dataset, to_float
from derkit.diagnosis.evaluation import autoattack_mask, predict, strong_mask
from derkit.generation.extractor import extractor_for
from derkit.generation.metrics import distances
from derkit.training.loop import train
from derkit.util import write_json

PACKAGES = ("derkit", "torch", "torchattacks", "foolbox", "pyautoattack", "torch-fidelity",
            "torchmetrics", "scikit-learn")
OUT = Path(__file__).resolve().parents[1] / "figures" / "records" / "peers.json"
SMALL = dict(width=6, train_size=2000, batch_size=32, epochs=6, eval_size=100, eval_steps=5,
             probe_size=16, probe_every=100, final_size=100, final_steps=5, strong_size=0,
             precision="fp64", device="cpu")
MODELS = {"standard": dict(method="standard", eps=0.1),
          "pgd": dict(method="pgd", steps=5, eps=0.1),
          "fgsm_der": dict(method="fgsm", regularizer="der", eps=0.1)}
EPS, STEPS = {"linf": 0.1, "l2": 1.5}, 10
Attack = Callable[[Tensor, Tensor], Tensor]  # (x, y) -> x*


def peer(name: str) -> ModuleType | None:
    """A package, or None where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        return None


def versions() -> dict[str, str | None]:
    """Installed versions of the kit, of its base and of the peers."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


# ---------------------------------------------------------------------------------------- attacks
def from_torchattacks(package: ModuleType, model: nn.Module, norm: str, start: bool) -> Attack:
    """PGD of torchattacks. It adds 1e-10 to the norm of a gradient that its mean over the batch has
    made small; here 1e-30."""
    options = dict(eps=EPS[norm], alpha=EPS[norm] / 4, steps=STEPS, random_start=start)
    if norm == "l2":
        return package.PGDL2(model, **options, eps_for_division=1e-30)
    return package.PGD(model, **options)


def from_foolbox(package: ModuleType, model: nn.Module, norm: str, loss: str,
                 start: bool) -> Attack:
    """PGD of foolbox, on CE or with its own L_inf loop on the CW margin."""

    class MarginPGD(package.attacks.LinfPGD):
        def get_loss_fn(self, wrapped, labels):
            def margin(x):
                logits, y = wrapped(x).raw, labels.raw
                own = nn.functional.one_hot(y, logits.shape[1]).bool()
                others = logits.masked_fill(own, -torch.inf).amax(1)
                value = (others - logits.gather(1, y[:, None]).squeeze(1)).sum()
                return import_module("eagerpy").astensor(value)

            return margin

    kinds = {("linf", "ce"): package.attacks.LinfPGD, ("linf", "margin"): MarginPGD,
             ("l2", "ce"): package.attacks.L2PGD}
    attack = kinds[norm, loss](abs_stepsize=EPS[norm] / 4, steps=STEPS, random_start=start)
    return with_foolbox(package, model, attack, norm)


def with_foolbox(package: ModuleType, model: nn.Module, attack, norm: str) -> Attack:
    wrapped = package.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return lambda x, y: attack(wrapped, x, y, epsilons=EPS[norm])[1]


def attack_pairs(model: nn.Module) -> list[dict]:
    """Rows (attack, norm, eps, peer, same start?, ours, theirs) of attacks that should agree.

    torchattacks draws L_2 starts with a uniform radius, where the kit and foolbox draw them
    uniformly from the ball: that pair is recorded with ``same_definition`` false.
    """
    foolbox, torchattacks, rows = peer("foolbox"), peer("torchattacks"), []

    def ours(norm: str, loss: str, start: bool) -> Attack:
        return lambda x, y: pgd(model, x, y, EPS[norm], alpha=EPS[norm] / 4, steps=STEPS, norm=norm,
                                loss=loss, random_start=start,
                                generator=torch.Generator().manual_seed(0))

    def add(attack: str, norm: str, name: str, start: bool, mine: Attack, theirs: Attack) -> None:
        same = not (name == "torchattacks" and norm == "l2" and start)
        rows.append(dict(attack=attack, norm=norm, eps=EPS[norm], peer=name, random_start=start,
                         same_definition=same, ours=mine, theirs=theirs))

    def our_fgsm(x: Tensor, y: Tensor) -> Tensor:
        return fgsm(model, x, y, EPS["linf"])

    if torchattacks:
        theirs = torchattacks.FGSM(model, eps=EPS["linf"])
        add("FGSM", "linf", "torchattacks", False, our_fgsm, theirs)
    if foolbox:
        theirs = with_foolbox(foolbox, model, foolbox.attacks.FGSM(), "linf")
        add("FGSM", "linf", "foolbox", False, our_fgsm, theirs)
    for start in (False, True):
        for norm, loss in (("linf", "ce"), ("linf", "margin"), ("l2", "ce")):
            name = f"PGD-{STEPS}" + (" on the margin" if loss == "margin" else "")
            mine = ours(norm, loss, start)
            if torchattacks and loss == "ce":
                theirs = from_torchattacks(torchattacks, model, norm, start)
                add(name, norm, "torchattacks", start, mine, theirs)
            if foolbox:
                theirs = from_foolbox(foolbox, model, norm, loss, start)
                add(name, norm, "foolbox", start, mine, theirs)
    return rows


def compare_attacks(model: nn.Module, split: Split, batch_size: int = 250) -> list[dict]:
    """One record per pair: robust accuracy of each; with the same start the largest difference of
    x*, and the share of images within 1e-5.

    The model is compared in float64, so that rounding does not decide the sign of a gradient.
    """
    model, records = model.double().eval(), []
    for row in attack_pairs(model):
        torch.manual_seed(0)
        mine, theirs, far = [], [], []
        for x, y in split.batches(batch_size, dtype=torch.float64):
            a, b = row["ours"](x, y), row["theirs"](x, y).detach()
            for out, z in ((mine, a), (theirs, b)):
                with torch.no_grad():
                    out.append(model(z).argmax(1) == y)
            far.append((a - b).flatten(1).abs().amax(1))
        mine, theirs, far = (torch.cat(t) for t in (mine, theirs, far))
        record = {k: v for k, v in row.items() if k not in ("ours", "theirs")}
        record |= dict(images=len(split), ours=share(mine), theirs=share(theirs))
        if not row["random_start"]:
            record |= dict(largest_difference=far.max().item(), equal_to_1e_5=share(far <= 1e-5))
        records.append(record)
    return records


def compare_autoattack(model: nn.Module, split: Split, eps: float = EPS["linf"]) -> dict:
    """Who survives AutoAttack, and who our attacks; images that only one side breaks are listed."""
    model, began = model.float().eval(), time.perf_counter()
    theirs = autoattack_mask(model, split, eps)
    seconds, x, y = time.perf_counter() - began, split.floats(), split.labels
    clean = predict(model, split).argmax(1) == y

    def survives(**options) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x_adv = pgd(model, x, y, eps, steps=50, restarts=10, generator=generator, **options)
        with torch.no_grad():
            return clean & (model(x_adv).argmax(1) == y)

    ours = {"PGD-50-10": survives(), "margin PGD-50-10": survives(loss="margin"),
            "strong": strong_mask(model, split, eps, steps=100)}
    rows = {name: dict(accuracy=share(mask), only_autoattack_breaks=where(mask & ~theirs),
                       only_ours_breaks=where(theirs & ~mask)) for name, mask in ours.items()}
    return dict(eps=eps, images=len(split), clean=share(clean), autoattack=share(theirs),
                seconds=round(seconds, 1), ours=rows)


def share(mask: Tensor) -> float:
    return mask.double().mean().item()


def where(mask: Tensor) -> list[int]:
    return mask.nonzero().squeeze(1).tolist()


# -------------------------------------------------------------------------------------- distances
class Features(nn.Module):
    """The shipped extractor as torchmetrics takes one: uint8 images -> features or logits."""

    def __init__(self, net: nn.Module, which: int) -> None:
        super().__init__()
        self.net, self.which, self.num_features = net, which, 72

    def forward(self, images: Tensor) -> Tensor:
        return self.net(to_float(images))[self.which].double()


def compare_distances(images: Tensor, real: Tensor) -> dict[str, dict[str, float]]:
    """CIS, CFD and CKD of `distances` beside torchmetrics with the same extractor.

    Below 1,000 images a subset of the kernel distance is the whole set, so nothing is drawn.
    """
    image = import_module("torchmetrics.image")
    extractor = extractor_for("fashion_mini")
    ours = distances(extractor(images), extractor(real), extractor.columns)
    features, logits = (Features(extractor.net, i) for i in (0, 1))
    size = min(len(images), len(real))
    frechet = image.FrechetInceptionDistance(feature=features)
    kernel = image.KernelInceptionDistance(feature=features, subsets=1, subset_size=size)
    for metric in (frechet, kernel):
        metric.update(real, real=True)
        metric.update(images, real=False)
    score = image.InceptionScore(feature=logits, splits=1)
    score.update(images)
    theirs = {"CIS": score.compute()[0], "CFD": frechet.compute(), "CKD": kernel.compute()[0]}
    return {name: dict(ours=ours[name], theirs=value.item()) for name, value in theirs.items()}


def noisy(images: Tensor) -> Tensor:
    """uint8 images with noise of 20 grey levels: a set that is at some distance from the real."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images.float() + 20 * noise).clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------------- main
def trained(options: dict, dataset: Dataset) -> tuple[nn.Module, dict]:
    """A network trained by the kit, with its config and test accuracies."""
    config = TrainConfig.make("fashion_mini", **(SMALL | options))
    with tempfile.TemporaryDirectory() as folder:
        run = train(config, dataset, folder=folder, verbose=False)
        return run.model(), dict(config=config.as_dict(), final=run.final["last"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--images", type=int, default=1000, help="test images of the attacks")
    parser.add_argument("--autoattack", type=int, default=1000, help="test images of AutoAttack")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_dataset(train_size=SMALL["train_size"])
    record = dict(versions=versions(), data=dataset.name, data_sha256=dataset.sha256, seed=0,
                  steps=STEPS, models={})
    for name, settings in MODELS.items():
        model, about = trained(settings, dataset)
        about["attacks"] = compare_attacks(model, dataset.test.take(slice(options.images)))
        some = dataset.test.take(slice(options.autoattack))
        about["autoattack"] = compare_autoattack(model, some)
        for row in (*about["attacks"], about["autoattack"]):
            print(name, json.dumps(row), flush=True)
        record["models"][name] = about
    images, real = noisy(dataset.train.images[:500]), dataset.test.images[:500]
    record["distances"] = compare_distances(images, real)
    print(json.dumps(record["distances"]))
    write_json(options.out, record)


if __name__ == "__main__":
    main()
