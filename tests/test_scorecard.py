"""The scorecard: PASS, FAIL and not run from synthetic records, and the committed ones."""

import json

import pytest

from derkit import scorecard as cards
from derkit.errors import DerkitError
from derkit.manifest import load_manifest

PUBLISHED = dict(metric="pgd50", value=0.46, tolerance=0.03, source="somebody 2020")
MANIFEST = dict(name="toy", preset="cifar10", seeds=[0, 1],
                runs=[dict(label="base", set=dict(method="fgsm"), expect=[PUBLISHED]), dict(label="der", set=dict(regularizer="der"))],
                claims=[dict(text="no collapse", run="der", metric="collapsed", relation="<=", value=0),
                        dict(text="stronger", run="der", metric="aa", relation=">", than="base"),
                        dict(text="gap", run="der", metric="gap", relation="<=", value=0.01)])
HEALTHY, COLLAPSED = [0.2, 0.3, 0.4, 0.4, 0.4, 0.4], [0.2, 0.4, 0.0, 0.0, 0.0, 0.0]


@pytest.fixture
def suites(tmp_path):
    folder = tmp_path / "suites"
    folder.mkdir()
    (folder / "toy.json").write_text(json.dumps(MANIFEST))
    return folder


@pytest.fixture
def put(suites, tmp_path):
    """Writes a synthetic record of one run of the manifest."""
    jobs = {(j.label, j.config.seed): j for j in load_manifest(suites / "toy.json").jobs}

    def write(label, seed, pgd50=0.46, aa=0.40, best=0.42, last=0.42, curve=HEALTHY, **changed):
        job = jobs[label, seed]
        folder = tmp_path / "records" / "toy" / job.slug
        folder.mkdir(parents=True, exist_ok=True)
        train = job.config.change(precision="bf16", **changed).as_dict()
        (folder / "config.json").write_text(json.dumps(dict(label=label, train=train, source="JPEG copy, class folders")))
        rows = [dict(epoch=i + 1, valid_pgd=v, valid_fgsm=0.5, train_acc=0.5, steps=dict(acc=[0.5] * 4, aae=[0.0] * 4))
                for i, v in enumerate(curve)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        values = {k: v for k, v in dict(pgd50=pgd50, aa=aa).items() if v is not None}
        final = dict(last=values | dict(pgd=last), best=values | dict(pgd=best))
        (folder / "final.json").write_text(json.dumps(final))

    return write


def verdicts(suites, tmp_path):
    return cards.scorecard(suites=suites, records=tmp_path / "records")["verdict"].tolist()


def test_without_records_nothing_passes(suites, tmp_path):
    table = cards.scorecard(suites=suites, records=tmp_path / "records")
    assert table["verdict"].tolist() == ["not run"] * 4
    assert set(table["ours"]) == {"-"} and set(table["seeds"]) == {"0 of 2"} and set(table["record"]) == {"-"}
    assert table["published"].tolist() == ["0.46", "-", "-", "-"] and table["source"][0] == "somebody 2020"
    assert table["condition"][0] == "cifar10, preact_resnet18, eps 8/255, 30 epochs"


def test_pass(suites, tmp_path, put):
    for seed, shift in ((0, 0.02), (1, -0.02)):
        put("base", seed, pgd50=0.46 + shift, aa=0.40)
        put("der", seed, aa=0.45 + shift)
    table = cards.scorecard(suites=suites, records=tmp_path / "records")
    assert table["verdict"].tolist() == ["PASS"] * 4
    assert table["ours"][0] == "0.460 [0.440, 0.480]" and table["seeds"][0] == "2 of 2"
    assert table["record"][0] == "toy/base-s*" and table["bar"][2] == "> base (0.400 [0.400, 0.400])"
    assert table["condition"][0] == "cifar10 (JPEG copy, class folders), preact_resnet18, eps 8/255, 30 epochs"


def test_fail(suites, tmp_path, put):
    for seed in (0, 1):
        put("base", seed, pgd50=0.40, aa=0.40)
        put("der", seed, aa=0.40, best=0.45, last=0.42, curve=COLLAPSED if seed else HEALTHY)
    assert verdicts(suites, tmp_path) == ["FAIL"] * 4, "outside the tolerance, one seed collapsed, equal is not above, gap 0.03"
    put("base", 0, pgd50=0.5, aa=0.40)
    put("base", 1, pgd50=0.49, aa=0.40)
    assert verdicts(suites, tmp_path)[0] == "FAIL", "above the tolerance"


def test_a_missing_seed_or_metric_is_not_run(suites, tmp_path, put):
    put("base", 0)
    put("base", 1, aa=None)
    put("der", 0, aa=0.9)
    table = cards.scorecard(suites=suites, records=tmp_path / "records")
    assert table["verdict"].tolist() == ["PASS", "not run", "not run", "not run"]
    assert table["seeds"].tolist() == ["2 of 2", "1 of 2", "1 of 2", "1 of 2"] and table["ours"][1] == "0.000"
    put("der", 1, aa=0.9)
    assert verdicts(suites, tmp_path) == ["PASS", "PASS", "not run", "PASS"], "the run to compare with has no AutoAttack for one seed"


def test_a_diverged_seed_fails(suites, tmp_path, put):
    put("der", 0, aa=0.9)
    job = next(j for j in load_manifest(suites / "toy.json").jobs if j.slug == "der-s1")
    folder = tmp_path / "records" / "toy" / job.slug
    folder.mkdir()
    (folder / "diverged.json").write_text(json.dumps(dict(train=job.config.as_dict())))
    table = cards.scorecard(suites=suites, records=tmp_path / "records")
    assert table["verdict"].tolist() == ["not run", "FAIL", "FAIL", "FAIL"] and table["seeds"][1] == "1 of 2, 1 diverged"
    (folder / "diverged.json").write_text(json.dumps(dict(train=job.config.change(lr=9).as_dict())))
    assert verdicts(suites, tmp_path) == ["not run"] * 4, "a run of other settings diverged"


@pytest.mark.parametrize("changed", [dict(epochs=1), dict(dataset="fashion_mini"), dict(train_size=500), dict(eps=0.2)])
def test_records_of_other_settings_or_data_are_not_judged(suites, tmp_path, put, changed):
    """Published CIFAR values are never compared with bundled data, short runs or another radius."""
    for seed in (0, 1):
        put("base", seed, **changed)
        put("der", seed, aa=0.9, **changed)
    assert verdicts(suites, tmp_path) == ["not run"] * 4


def test_relations():
    def claim(relation, tolerance=0.0):
        return cards.Claim("", "", "pgd", relation=relation, value=0.5, tolerance=tolerance)

    def which(relation, tolerance=0.0):
        return [cards.holds(claim(relation, tolerance), mean, 0.5) for mean in (0.4, 0.5, 0.6)]

    assert which("about", 0.05) == [False, True, False] and which("about", 0.1) == [True, True, True]
    assert which(">=") == [False, True, True] and which(">") == [False, False, True]
    assert which("<=") == [True, True, False] and which("<") == [True, False, False]
    assert which(">=", 0.1) == [True, True, True]


def test_claims_across_suites(suites, tmp_path, put):
    other = dict(name="other", preset="cifar10", runs=[dict(label="x", set=dict(method="n_fgsm"))],
                 claims=[dict(text="c", run="x", metric="aa", relation=">", than=["toy: base"])])
    (suites / "other.json").write_text(json.dumps(other))
    table = cards.scorecard(["other"], suites=suites, records=tmp_path / "records")
    assert table["verdict"].tolist() == ["not run"] and table["bar"][0] == "> toy: base (-)"
    (suites / "other.json").write_text(json.dumps(other).replace("toy: base", "toy: bass"))
    with pytest.raises(DerkitError, match="no run 'bass'"):
        cards.scorecard(["other"], suites=suites, records=tmp_path / "records")
    with pytest.raises(DerkitError, match="Did you mean 'other'"):
        cards.scorecard(["othr"], suites=suites)


def test_the_repository(capsys, tmp_path):
    """What has not been run is said to be so, and the claims on the bundled data are judged by its records."""
    table = cards.scorecard()
    bundled = table["condition"].str.startswith("fashion_mini")
    assert set(table[bundled]["verdict"]) == {"PASS", "FAIL"} and (table[bundled]["published"] == "-").all()
    assert (table[table["verdict"] != "not run"]["ours"] != "-").all()
    assert cards.main(["co_fashion_mini", "--csv", str(tmp_path / "card.csv")]) == 0
    assert "FGSM collapses in every seed" in capsys.readouterr().out and (tmp_path / "card.csv").stat().st_size > 500
    assert cards.main(["co_fashion_min"]) == 2 and "Did you mean" in capsys.readouterr().err


def test_by_claim_counts_the_runs_of_a_claim(suites, tmp_path, put):
    put("base", 0)
    put("base", 1)
    table = cards.by_claim(cards.scorecard(suites=suites, records=tmp_path / "records"))
    assert table.values.tolist() == [["toy", "base: pgd50, last epoch", 1, 1, 0, 0], ["toy", "no collapse", 1, 0, 1, 0],
                                     ["toy", "stronger", 1, 0, 1, 0], ["toy", "gap", 1, 0, 1, 0]]
