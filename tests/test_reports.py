"""PGD-50-10 and AutoAttack in the final evaluation, and for runs that are finished already."""

import pytest
import torch

from derkit import reports
from derkit.config import TrainConfig
from derkit.errors import DerkitError
from derkit.evaluation import pgd50_accuracy, robust_accuracy
from derkit.training import train

EPS = 0.03  # where the fixture's net is neither always nor never fooled


def test_pgd50_is_the_worst_of_its_restarts(trained, mini):
    part = mini.test.take(slice(64))
    clean, one, ten = (pgd50_accuracy(trained, part, eps, steps=5, restarts=n) for eps, n in ((0, 1), (EPS, 1), (EPS, 10)))
    assert clean > one >= ten > 0
    assert ten <= robust_accuracy(trained, part, EPS, steps=5)
    assert pgd50_accuracy(trained, part, EPS, steps=5, restarts=1, alpha=EPS / 4) == one, "the step is eps/4"
    assert pgd50_accuracy(trained, part, EPS, steps=5, restarts=1, alpha=EPS / 400) > one


def test_further_evaluation_says_what_was_done(trained, mini):
    pytest.importorskip("pyautoattack", reason="pyautoattack (extra: eval) is not installed")
    config = TrainConfig.make(eps=0.08, pgd50_size=24, autoattack_size=24)  # few images survive: those cost 5,000 queries each
    out = reports.further_evaluation(trained, mini, config)
    assert out["pgd50_images"] == out["aa_images"] == 24 and out["pgd50_alpha"] == 0.02
    assert out["aa_package"].startswith("pyautoattack ")
    assert out["aa"] <= out["pgd50"] + 1 / 24 < 0.5, "AutoAttack is the stronger one, within one image"
    assert reports.missing(out, mini, config) == [] and reports.further_evaluation(trained, mini, config, out) == {}
    assert reports.missing(out, mini, config.change(pgd50_size=25, autoattack_size=20)) == ["pgd50"]
    assert reports.missing({}, mini, TrainConfig.make()) == []


def test_finished_runs_are_completed_without_training(config, tiny):
    plain = config(epochs=3, pgd50_size=0)
    first = train(plain, tiny, verbose=False)
    epochs = (first.folder / "metrics.jsonl").read_bytes()
    assert not any(k.startswith("pgd50") for k in first.final["last"])
    again = train(plain.change(pgd50_size=8), tiny, verbose=False)
    assert again.folder == first.folder and (again.folder / "metrics.jsonl").read_bytes() == epochs
    for which in ("last", "best"):
        assert first.final[which].items() < again.final[which].items()
        assert again.final[which]["pgd50_images"] == 8
    fresh = train(plain.change(pgd50_size=8), tiny, folder=first.folder.parent / "fresh", verbose=False)
    assert fresh.final == again.final, "the same values as in the run's own final evaluation"
    before = (again.folder / "final.json").stat().st_mtime_ns
    train(plain.change(pgd50_size=4), tiny, verbose=False)
    assert (again.folder / "final.json").stat().st_mtime_ns == before, "nothing to add, nothing written"


def test_users_own_model_is_completed_too(config, tiny):
    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))

    first = train(config(epochs=1), tiny, model=net(), verbose=False)
    again = train(config(epochs=1, pgd50_size=8), tiny, model=net(), verbose=False)
    assert again.folder == first.folder and again.final["last"]["pgd50_images"] == 8


@pytest.mark.parametrize("changes, message", [(dict(eps=0), "eps > 0"), (dict(), "derkit\\[eval\\]")])
def test_autoattack_that_cannot_run_is_told_before_training(config, tiny, changes, message, monkeypatch, home):
    pytest.importorskip("pyautoattack", reason="pyautoattack (extra: eval) is not installed")
    if not changes:
        monkeypatch.setattr(reports, "find_spec", lambda name: None)
    with pytest.raises(DerkitError, match=message):
        train(config(autoattack_size=8, **changes), tiny, verbose=False)
    assert not list(home.rglob("*.json"))
