"""finetune.py --labels and --transfer: each test names the bug that it would catch."""
# ruff: noqa: F811 (a fixture is imported, and then named as an argument)

import common
import finetune
import pytest
import torch
import vae
from sklearn.base import BaseEstimator
from test_finetune import (  # noqa: F401
    FAST, digits, encoder, few, few_trainings, fewer, no_figures, quick_main)

# --------------------------------------------------------------------------- labels


def test_label_subsets_are_stratified_and_nested():
    """1,000 labels that leave out some of the 100, or a class with none."""
    y = torch.arange(500) % 10
    subsets = [finetune.label_subset(y, n, seed=0) for n in (10, 45, 100, 500)]
    for small, large in zip(subsets, subsets[1:], strict=False):
        assert set(small.tolist()) < set(large.tolist())
    for idx in subsets:
        counts = y[idx].bincount(minlength=10)
        assert len(set(idx.tolist())) == len(idx) and counts.max() - counts.min() <= 1
    assert finetune.label_subset(y, 45, 0).equal(subsets[1])
    assert not finetune.label_subset(y, 45, 1).equal(subsets[1])


def blobs(n, seed):
    """Codes (n, 4) of three classes: the first two dimensions tell them apart, far from zero."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=rng)
    centres = torch.tensor([[9.0, 9, 9, 9], [9, 12, 9, 9], [12, 9, 9, 9]])
    return centres[y] + 0.5 * torch.randn(n, 4, generator=rng), y


def test_probe():
    """Codes on another scale that count less; a test set that is centred by its own mean."""
    train, val, test = blobs(60, 0), blobs(300, 1), blobs(300, 2)
    result = finetune.probe(lambda x: x, train, val, test)
    assert min(result) > 0.95
    scale = torch.tensor([1e-3, 1, 1e3, 1])
    assert finetune.probe(lambda x: x * scale, train, val, test) == pytest.approx(result, abs=0.01)
    no_use = [(x[:, 2:], y) for x, y in (train, val, test)]  # these dimensions tell nothing
    assert max(finetune.probe(lambda x: x, *no_use)) < 0.45
    one_class = [part[test[1] == 1] for part in test]
    assert finetune.probe(lambda x: x, train, val, one_class)[1] > 0.9


class FakeRegression(BaseEstimator):
    """Takes the place of LogisticRegression: how right it is, is said by how many it is asked."""

    right = {}  # {number of codes: accuracy for each of INVERSE_PENALTIES}

    def __init__(self, C, max_iter):
        self.C, self.max_iter = C, max_iter

    def fit(self, z, y):
        self.seen_ = len(z)
        return self

    def score(self, z, y):
        assert self.seen_ == 10
        return self.right[len(z)][finetune.INVERSE_PENALTIES.index(self.C)]


@pytest.mark.parametrize("val, chosen", [((0.5, 0.9, 0.6), 1), ((0.9, 0.5, 0.9), 0)])
def test_probe_is_chosen_on_validation_codes(val, chosen, monkeypatch):
    """The penalty that does best on the test set; of equal ones that which does best there."""
    monkeypatch.setattr(finetune, "LogisticRegression", FakeRegression)
    for test in ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1)):
        monkeypatch.setattr(FakeRegression, "right", {20: val, 30: test})
        parts = blobs(10, 0), blobs(20, 1), blobs(30, 2)
        assert finetune.probe(lambda x: x, *parts) == (val[chosen], test[chosen])


@pytest.mark.parametrize("val, chosen", [((0.5, 0.9, 0.6), 1), ((0.9, 0.5, 0.9), 0)])
def test_settings_are_chosen_on_validation_images(val, chosen, encoder, fewer, monkeypatch,
                                                  no_figures):
    """Settings that do best on the test set; of equal ones those that do best there."""
    monkeypatch.setattr(vae, "main", quick_main(vae, fewer))
    monkeypatch.setattr(finetune, "probe", lambda *args: (0.0, 0.0))
    monkeypatch.setattr(finetune, "fit", lambda flags, *rest, **more: (
        finetune.CANDIDATES.index({"lr": flags.lr, "augment": flags.augment}), []))
    for test in ((0.1, 0.2, 0.3), (0.3, 0.2, 0.1)):
        monkeypatch.setattr(finetune, "evaluate", lambda which, x, y, test=test: (  # fit's answer
            0.0, (test if x is fewer.x_test else val)[which]))
        result = finetune.main([*FAST, "--labels", "10", "20", "--encoder", encoder])
        for way in ("fine-tuned", "from scratch"):
            for n in ("10", "20"):
                point = result["label_efficiency"][way][n]
                assert point["each"] == [test[chosen]] * 3
                assert point["val_each"] == [val[chosen]] * 3


@pytest.mark.parametrize("by_accuracy, best", [(False, 1), (True, 2)])
def test_which_epoch_is_kept(by_accuracy, best, fewer, monkeypatch):
    """The first epoch of a network with few labels: its loss rises while its accuracy does too."""
    ends = iter([(0.0, 0.0), (1.0, 0.5), (0.0, 0.0), (2.0, 0.6)])  # seen and unseen, two epochs
    monkeypatch.setattr(finetune, "evaluate", lambda *args: next(ends))
    args = finetune.parse_args([*FAST, "--model", "cnn", "--out-dir", "run"])
    run, both = common.Run(args, fewer), (fewer.x_train, fewer.y_train)
    finetune.fit(finetune.settings(args, "cnn"), run, "cnn", (0, 0), both, both, 10,
                 by_accuracy=by_accuracy)
    assert run.best["epoch"] == best


def test_which_images_are_labelled(encoder, fewer, monkeypatch, no_figures):
    """Labels of validation or test images; other images for another way; two trainings in one."""
    numbered = torch.arange(100.0).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)  # each tells its index
    monkeypatch.setattr(common, "load_data", lambda args: fewer._replace(x_train=numbered))
    monkeypatch.setattr(vae, "main", quick_main(vae, fewer))
    monkeypatch.setattr(finetune, "evaluate", lambda *args: (0.0, 0.5))
    used, parts = {}, []

    def note(seed, scratch, train, val, test=None):
        ids, times = train[0][:, 0, 0, 0].long().unique(return_counts=True)
        assert times.min() == times.max() and train[1].equal(
            fewer.y_train[train[0][:, 0, 0, 0].long()])
        used.setdefault((len(ids), seed), []).append((scratch, ids.tolist()))
        assert not set(ids.tolist()) & set(val[0][:, 0, 0, 0].long().tolist())
        assert len(val[0]) == 20 and (test is None or test[0] is fewer.x_test)

    def fit(flags, run, part, seeds, train, val, classes, start, by_accuracy):
        note(seeds[0], flags.scratch, train, val)
        parts.append(part)
        assert flags.train == "all" and flags.encoder == encoder and by_accuracy
        return None, []
    monkeypatch.setattr(finetune, "fit", fit)
    probed = iter(range(1000))  # two for each seed, three seeds for each number of labels
    monkeypatch.setattr(finetune, "probe", lambda encode, *parts: note(
        next(probed) // 2 % 3, None, *parts) or (0.0, 0.5))
    finetune.main([*FAST, "--labels", "40", "10", "--encoder", encoder])
    assert used.keys() == {(n, seed) for n in (10, 40) for seed in range(3)}
    for (_, seed), ways in used.items():
        assert [scratch for scratch, _ in ways] == [None] * 2 + [False] * 3 + [True] * 3
        assert all(ids == ways[0][1] for _, ids in ways)
        assert set(ways[0][1]) <= set(used[40, seed][0][1])
    assert len(set(parts)) == len(parts) == 2 * 3 * 2 * 3


def test_transfer_starts_from_the_other_classes_alone(fewer, monkeypatch, no_figures):
    """Images of the classes to come in the pre-training; a last layer, or nothing, carried over."""
    numbered = torch.arange(100.0).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)  # each tells its index
    monkeypatch.setattr(common, "load_data", lambda args: fewer._replace(x_train=numbered))
    monkeypatch.setattr(finetune, "evaluate", lambda *args: (0.0, 0.5))
    trainings, probed = [], []

    def fit(flags, run, part, seeds, train, val, classes, start=None, by_accuracy=False):
        model = finetune.build(flags, classes, start)
        trainings.append((part, start, model.state_dict()))
        new = 0 if part.startswith("first classes") else 5
        for x, y in (train, val):
            assert classes == 5 and set(y.tolist()) <= set(range(5))
            assert y.equal(fewer.y_train[x[:, 0, 0, 0].long()] - new)
        return model, []

    def probe(encode, train, val, test):
        probed.append(encode(fewer.x_test))
        assert all(set(y.tolist()) <= set(range(5)) for _, y in (train, val, test))
        return 0.0, 0.5
    monkeypatch.setattr(finetune, "fit", fit)
    monkeypatch.setattr(finetune, "probe", probe)
    result = finetune.main([*FAST, "--transfer"])["transfer"]
    assert [len(points) for points in result.values()] == [1] * 3 and len(probed) == 3
    assert {x.shape[1] for x in probed} == {105}
    for part, start, weights in trainings:
        if part.startswith("first classes"):
            old = weights  # the trainings of a seed follow one another
        elif "scratch" in part:
            assert start is None
        else:
            assert old.keys() - start.keys() == {k for k in old if k.startswith("head")}
            assert all(weights[k].equal(old[k]) for k in start)
    assert len(trainings) == 3 * (1 + 2 * 2)


def test_transfer_where_splits_differ_by_some_images(monkeypatch, no_figures):
    """A number of labels that only some of the three seeds have."""
    split = common.split
    monkeypatch.setattr(common, "split", lambda y, seed: (
        split(y, seed)[0][8 * seed:], split(y, seed)[1]))
    monkeypatch.setattr(finetune, "fit", lambda *args, **more: (finetune.CNN(5), []))
    for name in ("probe", "evaluate"):
        monkeypatch.setattr(finetune, name, lambda *args: (0.0, 0.5))
    result = finetune.main([*FAST, "--transfer"])["transfer"]
    assert all(len(p["each"]) == 3 for points in result.values() for p in points.values())
