"""Every figure can be drawn from records and arrays; make_figures.py draws those of figures/."""

from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from derkit import plots  # noqa: E402
from derkit.diagnosis.overfitting import co_alarms  # noqa: E402
from derkit.models import build_model  # noqa: E402
from derkit.records import load_records, records_folder  # noqa: E402
from scripts import make_figures  # noqa: E402

rng = np.random.default_rng(0)
NAMES = ["bag", "coat"]
labels = torch.arange(12) % 2
steps = torch.arange(12)
images = torch.from_numpy(rng.integers(0, 256, (12, 1, 8, 8), dtype=np.uint8))
samples = SimpleNamespace(images=images, x0=images.flip(2), labels=labels, steps=steps)
trace, frames = (torch.from_numpy(rng.random(s)) for s in ((12, 3, 12), (3, 12, 3, 8, 8)))
chains = SimpleNamespace(labels=labels, steps=steps, trace=trace, frames=frames,
                         frame_steps=[0, 4, 8])
reference = SimpleNamespace(of=lambda c: torch.linspace(0, 1, 9) + c)
E, E_adv, Ey, Ey_adv = rng.normal(size=(4, 50))
attack = SimpleNamespace(attack="PGD", E=E, E_adv=E_adv, Ey=Ey, Ey_adv=Ey_adv)
u = np.linspace(0, 1, 5)
path = dict(u=u, E=rng.normal(size=(5, 4)), ce=rng.normal(size=(5, 4)))
bars = pd.DataFrame({"clean": [0.8, 0.7], "clean min": 0.6, "clean max": 0.9, "pgd": 0.4}, NAMES)
strength = [{"model": m, "attack": a, "strength": e, "dE(x)": e} for m in "mn" for a in "FP"
            for e in (0.1, 0.2)]
dial = pd.DataFrame({"recall": [0.1, 0.2], "CFD": [3.0, 2.0], "tau": ["0", "1"]})


def runs(label):
    return load_records("ro_fashion_mini" if label == "pgd" else "co_fashion_mini")[label]


FIGURES = {  # function: arguments
    "overfitting_curves": lambda: [{"fgsm": runs("fgsm")[0]}],
    "overfitting_curves ro": lambda: [{"a": runs("pgd")[0], "b": [  # of unequal length
        SimpleNamespace(epochs=runs("pgd")[0].epochs.head(9)), *runs("pgd")]}, "ro"],
    "signal_curves": lambda: [runs("fgsm")[0], co_alarms(runs("fgsm")[0])],
    "filters": lambda: [{"m": build_model("one_layer", 3, 10, 8), "n": build_model(
        "one_layer", 3, 10, 8, filters=2)}],
    "scoreboard": lambda: [{"toy": bars.rename(columns=lambda c: c.replace("pgd", "aa")).assign(
        **{"aa min": 0.3, "aa max": 0.5})}],
    "alarm_leads": lambda: [{"toy": co_alarms(runs("fgsm")[0])}],
    "energy_map": lambda: [{"m": attack, "n": attack}],
    "delta_by_strength": lambda: [pd.DataFrame(strength)],
    "roc_curves": lambda: [{"m": (u, u, 0.5)}],
    "energy_paths": lambda: [{"m": path}, "ce"],
    "sample_grid": lambda: [images, labels, NAMES, "a title"],
    "compare_sets": lambda: [{"grey": images, "colour": frames[0]}, labels, NAMES],
    "nearest_neighbours": lambda: [samples, images, NAMES],
    "film_strip": lambda: [chains, NAMES],
    "energy_traces": lambda: [chains, reference, NAMES],
    "distributions": lambda: [{"real": E, "x0": torch.from_numpy(E_adv)}, "E(x, y)"],
    "trade_off": lambda: [{"tau": dial}, "recall", "CFD", "tau", dial.iloc[0]],
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_saved_and_closed(name, tmp_path):
    target = tmp_path / "new folder" / "figure.png"
    assert getattr(plots, name.split()[0])(*FIGURES[name](), save=target) is None
    pixels = plt.imread(target)[..., :3]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, "more than a frame"
    assert not plt.get_fignums()


def test_a_figure_can_be_left_open_for_a_slider():
    plots.compare_sets({"grey": images}, labels, NAMES, save=False)
    assert len(plt.get_fignums()) == 1
    plt.close()


def test_every_public_figure_is_drawn_here():
    public = {name for name, value in vars(plots).items() if not name.startswith("_")
              and getattr(value, "__module__", "") == plots.__name__}
    assert public - {"use_style"} == {name.split()[0] for name in FIGURES}


def test_the_figures_of_the_repository_come_from_its_records(tmp_path, capsys, monkeypatch):
    """By name. Layout is most of the time, and pictures are the same under one matplotlib only:
    so each figure is made up to its end, and an empty file stands for it."""
    def finish(save, *_, **__):
        save.touch()
        plt.close()

    monkeypatch.setattr(plots, "_finish", finish)
    with matplotlib.rc_context():
        make_figures.main(["--out", str(tmp_path)])
    committed = {path.name for path in records_folder().parent.glob("*.png")}
    assert {path.name for path in tmp_path.iterdir()} == committed
    assert "skipped" not in capsys.readouterr().out
