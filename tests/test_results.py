"""The tables of docs/results.md are those of the records; the generator's parts."""

import numpy as np
import pandas as pd
import pytest

from derkit.diagnosis.overfitting import SIGNALS, co_onset
from derkit.records import load_records, load_tested, records_folder, title
from derkit.util import read_json
from experiments import results

SUITES = sorted(path.name for path in records_folder().glob("co_*"))


def test_the_page_is_what_the_records_say():
    """`python -m experiments.results` would change nothing."""
    text = results.PAGE.read_text()
    assert len(results.BLOCK.findall(text)) >= 8 and results.render(text) == text
    assert results.render("<!-- test command -->\nstays\n<!-- end -->").count("stays") == 1


@pytest.mark.parametrize("suite", SUITES)
def test_rows_against_the_final_records(suite):
    """One row by hand: mean, standard error and range over seeds of a JSON field."""
    table, label = results.rows(suite), "n_fgsm"
    runs = load_records(suite)[label]
    values = pd.Series([run.final["last"]["aa"] for run in runs])
    row = table.loc[title(label)]
    found = [float(word.strip("[],")) for word in row["AutoAttack"].replace("±", "").split()]
    expected = [values.mean(), values.std() / len(values) ** 0.5, values.min(), values.max()]
    assert len(found) == (4 if len(runs) > 1 else 1)
    assert found == pytest.approx(expected[: len(found)], abs=6e-4)
    assert {run.final["last"]["aa_images"] for run in runs} == {200}
    assert row["collapsed"] == f"{sum(co_onset(run) is not None for run in runs)} of {len(runs)}"
    assert table["AutoAttack"].str[:5].is_monotonic_decreasing  # all have three digits


@pytest.mark.parametrize("suite", [name for name in SUITES if name != "co_preact"])  # not tuned
def test_the_chosen_setting_is_the_best_on_validation_images(suite):
    tried, rows = results.tuning(suite), results.rows(suite)
    for method, row in tried.iterrows():
        values = {cell: float(cell.strip("*").rpartition(": ")[2]) for cell in row}
        best = [cell for cell in row if cell.startswith("**")]
        assert len(row) == (4 if suite == "co_fashion_mini" else 3)
        assert len(best) == 1 and values[best[0]] == max(values.values())
        assert best[0].strip("*").rpartition(": ")[0] == rows.loc[method, "settings"]


def test_energies_against_the_record():
    """One cell by hand; the sign of dE(x) turns with the strength, as docs and lesson 01 say."""
    record = read_json(records_folder() / "energy_views" / "fashion_mini.json")
    moved = [row["dE(x)"] for row in record["rows"] if row["model"] == "standard"
             and (row["attack"], row["radius"], row["steps"]) == ("PGD", 2, 20)]
    table = results.energies("energy_views")
    cell = table.loc["fashion_mini, standard, PGD", "2 eps"]
    assert cell == f"{np.mean(moved):+.2f} [{min(moved):+.2f}, {max(moved):+.2f}]"
    assert len(moved) == 3 and len(table) == 2 * 8
    for row, first in (("fashion_mini, standard, PGD", "-"), ("cifar10, standard, PGD", "+"),
                       ("cifar10, standard, PGD to least likely", "-")):
        signs = table.loc[row].filter(like=" eps").str[0]
        assert [signs.iloc[0], signs.iloc[-1]] == [first, "+"]


def test_the_first_figure_shows_what_its_caption_says():
    paths = read_json(records_folder() / "paths" / "co_cifar10.json")["paths"]
    fgsm, der = (np.diff(paths[name]["ce"]) for name in ("FGSM", "FGSM + DER (norm)"))
    assert fgsm[0] > 0 > fgsm[-1] and fgsm.sum() < 0 < der.min()


def test_generation_against_the_record():
    record = read_json(records_folder() / "generation_fashion_mini" / "recipe.json")
    key, rows = "local PCA, quantile stop", record["rows"]
    values = [row["CFD"] for row in rows if (row["model"], row["images"]) == ("SAT", key)]
    table = results.generation("generation_fashion_mini")
    cell = table.set_index("recipe", append=True)["CFD"]["SAT", key]
    assert cell == f"{np.mean(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def test_alarms_and_collapses_count_every_run():
    table = results.alarms(*SUITES)
    for suite in SUITES:
        runs = [run for group in load_tested(suite).values() for run in group]
        part = table[table["suite"] == suite]
        bad, good = (part[name].str.partition(" of ")[2].astype(int)
                     for name in ("rang", "false alarms"))
        columns = [signal.column for signal in SIGNALS.values()]  # PGD training has no AAE share
        measured = [sum(run.epochs[c].notna().any() for run in runs) for c in columns]
        assert list(bad + good) == measured and len(runs) == max(measured)
        collapsed = results.collapses(suite)
        assert len(results.collapses(suite, suite)) == 2 * len(collapsed), "same labels, two suites"
        assert set(bad) == {len(collapsed)}


def test_gains_by_two_judges():
    ball, rival = (load_tested("co_cifar10")[name] for name in ("fgsm + der ball", "n_fgsm"))
    gain = np.mean([a.final["last"]["strong"] - b.final["last"]["strong"]
                    for a, b in zip(ball, rival, strict=True)])
    table = results.gains("co_cifar10").set_index(["run", "than"])
    assert table.loc[("FGSM + DER (ball)", "N-FGSM"), "strong"].startswith(f"{gain:+.4f} ± ")


def test_titles_and_empty_tables():
    assert title("n_fgsm + der norm") == "N-FGSM + DER (norm)"
    assert title("pgd-10, AWP") == "PGD-10, AWP" and title("rs_fgsm + aaer") == "RS-FGSM + AAER"
    page = "a\n<!-- rows co_nothing -->\nold\n<!-- end -->\nb"
    assert results.render(page) == "a\n<!-- rows co_nothing -->\nNot run yet.\n\n<!-- end -->\nb"
