"""Candidates for the patients of another hospital: parts, mixtures, cross-validation, the choice."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from common.metrics import fit_platt
from feature_pipeline import BoostedTrees, ScoreModel
from training.candidates import ModelConfiguration
from training.fitting import FeatureTable, fit_model
from training.transfer import (
    AS_IT_IS,
    LOCAL,
    PARENT,
    RECALIBRATED,
    Candidate,
    OutOfFold,
    Part,
    Source,
    candidates,
    choose,
    fit_best,
)

SMALL = {"num_iterations": 8, "num_leaves": 5, "min_data_in_leaf": 5, "learning_rate": 0.2}
TREES = ModelConfiguration("trees", "lightgbm", SMALL, members=({}, {"extra_trees": True, "hide_codes": True}))
LINEAR = ModelConfiguration("linear", "logistic_regression", {"C": 1.0}, fill_value=0.0)
NAMES = 5


def hospital(seed: int, weights, n_groups: int = 80, each: int = 5, shift: float = -1.5):
    """(table, data) of snapshots whose log-odds are `weights` of the features."""
    generator = np.random.default_rng(seed)
    n = n_groups * each
    plain = generator.normal(size=(NAMES, n))
    odds = 2.0 * np.asarray(weights) @ plain + shift
    label = (generator.random(n) < 1 / (1 + np.exp(-odds))).astype(np.int8)
    hidden = np.where(generator.random(plain.shape) < 0.2, np.nan, plain)
    data = SimpleNamespace(label=label, group=np.repeat(np.arange(n_groups), each))
    return FeatureTable(plain, hidden, np.ones(n, dtype=bool)), data


def source_of(configuration=TREES, local=(0.3, 1, 0, 0, 0), first=(1, 0.3, 0, 0, 0), n_groups: int = 80, both=False):
    table, data = hospital(1, first, 200)
    parent = fit_model(configuration, table, np.arange(len(data.label)), np.arange(NAMES), data.label)
    parent.slope, parent.intercept = 1.2, -0.1
    own = (table, data.label) if both else None
    table, data = hospital(2, local, n_groups)
    return Source(parent, configuration, data, table, own)


@pytest.fixture(scope="module")
def source():
    return source_of(both=True)


ROWS = np.arange(400)


def test_candidates_begin_with_the_simplest_and_their_weights_add_up_to_1(source):
    found = candidates(source.parent, both=True)
    assert found[:2] == [AS_IT_IS, RECALIBRATED]
    assert {part.kind for c in found for part, _ in c.parts} == {"parent", "refitted", "local", "both"}
    assert all(sum(weight for _, weight in c.parts) == pytest.approx(1) for c in found)
    assert len({c.name for c in found}) == len(found)
    assert not any(part.kind == "both" for c in candidates(source.parent) for part, _ in c.parts)


def test_a_parent_that_cannot_be_refitted_is_mixed_as_it_is():
    source = source_of(LINEAR)
    found = candidates(source.parent)
    assert {part.kind for c in found for part, _ in c.parts} == {"parent", "local"}
    fitted = fit_best(source, found)
    assert np.isfinite(fitted.model.probability(source.features(ROWS))).all()


def test_a_refit_keeps_the_trees_and_moves_their_leaves_to_local_patients(source):
    features = source.features(ROWS)

    def refit(decay):
        return source.fit(Part("refitted", decay), ROWS)

    same, half, new = refit(1.0), refit(0.5), refit(0.0)
    assert np.allclose(same.log_odds(features), source.parent.log_odds(features))
    for old, own in zip(source.parent.members, half.members, strict=True):
        leaves = (m.booster.predict(features, pred_leaf=True) for m in (old, own))
        assert np.array_equal(*leaves)
    label = source.data.label
    loss = [
        -np.log(np.where(label == 1, p, 1 - p)).mean() for p in (m.probability(features) for m in (same, half, new))
    ]
    assert loss[0] > loss[1] > loss[2]  # learned from these very patients


def test_a_mixture_is_the_weighted_mean_of_its_parts_also_of_a_weighted_parent(source):
    weighted = ScoreModel(source.parent.members, weights=[0.8, 0.2])
    for parent in (source.parent, weighted):
        own = replace(source, parent=parent)
        refit = Part("refitted", 0.5)
        mixed = own.mixed(Candidate("", ((refit, 0.7), (LOCAL, 0.3))), ROWS)
        features = own.features(ROWS)
        expected = 0.7 * own.fit(refit, ROWS).log_odds(features) + 0.3 * own.fit(LOCAL, ROWS).log_odds(features)
        assert len(mixed.members) == 4 and sum(mixed.weights) == pytest.approx(1)
        assert np.allclose(mixed.log_odds(features), expected, rtol=1e-12)


def test_local_snapshots_weigh_more_in_training_on_both(source):
    features, label = source.features(ROWS), source.data.label

    def loss(part):
        p = source.fit(part, ROWS).probability(features)
        return -np.log(np.where(label == 1, p, 1 - p)).mean()

    assert loss(Part("both", 100.0)) < loss(Part("both", 1.0)) < loss(Part("both", 0.001))


def test_no_patient_is_scored_by_a_model_that_learned_from_him(monkeypatch):
    source = source_of()
    seen = []

    def fit(self, part, rows):
        seen.append((part, set(self.data.group[rows].tolist())))
        return SimpleNamespace(log_odds=lambda features: np.full(len(features), float(len(seen) - 1)))

    monkeypatch.setattr(Source, "fit", fit)
    found = source.out_of_fold([PARENT, LOCAL], ROWS)
    assert len(seen) == 10
    for part, scores in found.of_part.items():
        for group, score in zip(found.group.tolist(), scores.tolist(), strict=True):
            other, learned = seen[int(score)]
            assert other == part and group not in learned


def out_of_fold(**scores):
    generator = np.random.default_rng(5)
    group = np.repeat(np.arange(200), 4)
    label = (generator.random(800) < 0.2).astype(np.int8)
    noise = generator.normal(size=800)
    parts = {"parent": PARENT, "local": LOCAL, "refit": Part("refitted", 0.5)}
    own = {name: noise + 0.2 * generator.normal(size=800) - 2 for name in scores}
    of_part = {parts[name]: strength * label + own[name] for name, strength in scores.items()}
    return OutOfFold(of_part, label, group, group % 5)


REFIT = Candidate("refitted", ((Part("refitted", 0.5), 1.0),))
ALONE = Candidate("local", ((LOCAL, 1.0),))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"parent": 2.0, "refit": 0.5, "local": 0.5}, "as it is"),
        ({"parent": 0.2, "refit": 2.0, "local": 2.05}, "refitted"),  # new trees are better by less than noise
        ({"parent": 0.2, "refit": 0.5, "local": 2.0}, "local"),
    ],
)
def test_new_trees_are_chosen_only_if_they_are_better_beyond_noise(scores, expected):
    parent, of = ScoreModel([]), out_of_fold(**scores)
    parent.slope, parent.intercept = fit_platt(of.of_part[PARENT], of.label)
    chosen, trials = choose(parent, [AS_IT_IS, RECALIBRATED, REFIT, ALONE], of)
    assert chosen.name == expected
    assert trials[0].roc_auc == trials[1].roc_auc and {t.candidate for t in trials} > {chosen}


def test_a_badly_calibrated_parent_is_recalibrated():
    of = out_of_fold(parent=1.5)
    chosen, _ = choose(ScoreModel([], 1.0, 3.0), [AS_IT_IS, RECALIBRATED], of)
    assert chosen == RECALIBRATED


def test_what_is_chosen_is_calibrated_on_local_patients_and_the_same_every_time(source):
    known = candidates(source.parent)
    fitted, again = fit_best(source, known), fit_best(source, known)
    assert fitted.candidate == again.candidate
    features = source.features(ROWS)
    assert np.array_equal(fitted.model.probability(features), again.model.probability(features))
    assert fitted.probability.mean() == pytest.approx(source.data.label.mean(), rel=0.05)
    assert all(isinstance(member, BoostedTrees) for member in fitted.model.members)


def test_the_parent_as_it_is_keeps_its_calibration(source):
    fitted = fit_best(source, [AS_IT_IS])
    features = source.features(ROWS)
    assert fitted.candidate == AS_IT_IS
    assert np.array_equal(fitted.model.probability(features), source.parent.probability(features))
