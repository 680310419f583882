"""Head: the optimum scikit-learn finds, the same bits every time."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import Told
from scipy.special import log_softmax, xlogy
from sklearn.linear_model import LogisticRegression
from sklearn.utils import compute_class_weight

from keras_transfer.config import HeadConfig
from keras_transfer.data.tables import Table
from keras_transfer.errors import KerasTransferError, UsageError
from keras_transfer.evaluation.metrics import score
from keras_transfer.features.cache import FeatureCache
from keras_transfer.features.shards import FeatureSpec
from keras_transfer.training import linear
from keras_transfer.training.head import (
    LINEAR_L2,
    MLP_L2,
    TrainedHead,
    predict_head,
    train_head,
)
from keras_transfer.training.labelled import (
    CHUNK_ROWS,
    IN_MEMORY_BYTES,
    LabelledFeatures,
    Weighting,
    class_weighting,
    label_features,
    relative_weights,
)

FEATURES = 12
MLP = HeadConfig(
    kind="mlp", hidden=(16,), learning_rate=0.03, epochs=12, patience=3, l2=(1e-3, 1e-5)
)
SHORT_MLP = MLP.model_copy(update={"epochs": 3})
"""Where it does not matter how much is learned."""


def blobs(count: int, num_classes: int, seed: int = 0):
    """Overlapping classes of unequal size, features far from centred or scaled."""
    centers = np.random.default_rng(99).normal(size=(num_classes, FEATURES))
    rng = np.random.default_rng(seed)
    share = np.arange(1, num_classes + 1) / np.arange(1, num_classes + 1).sum()
    targets = rng.choice(num_classes, count, p=share)
    features = centers[targets] + 1.5 * rng.normal(size=(count, FEATURES))
    return (3 * features + 5).astype(np.float32), targets.astype(np.int64)


def many_labels(count: int, seed: int = 0):
    """Three classes that come in any combination."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, FEATURES))
    noise = 0.5 * rng.normal(size=(count, 3))
    targets = features[:, :3] + noise > [0.0, 0.8, -0.5]
    return (3 * features + 5).astype(np.float32), targets.astype(np.uint8)


def names(count: int) -> list[str]:
    return [f"class {i}" for i in range(count)]


def labelled(*views, targets, num_classes, balanced=False) -> LabelledFeatures:
    choice = "balanced" if balanced else "none"
    return LabelledFeatures(
        views, targets, class_weighting(targets, names(num_classes), choice)
    )


def folds(count: int, k: int = 3) -> np.ndarray:
    return np.random.default_rng(7).permutation(np.arange(count) % k)


def standardized(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean removed and one standard deviation for all, in float64."""
    mean = features.mean(0, dtype=np.float64)
    scale = float((features - mean).std())
    return (features - mean) / scale, mean, scale


def weights_on_standardized(trained: TrainedHead, mean, scale):
    kernel, bias = trained.model.get_weights()
    return kernel * scale, bias + mean @ kernel


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("l2", [1e-1, 1e-3])
@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_the_linear_head_is_the_optimum_of_scikit_learn(num_classes, l2, balanced):
    features, targets = blobs(400, num_classes)
    train = labelled(
        features, targets=targets, num_classes=num_classes, balanced=balanced
    )
    trained = train_head(HeadConfig(l2=(l2,)), train, None, 0)
    x, mean, scale = standardized(features)

    # Of two classes scikit-learn penalizes the difference of the two kernels, which
    # is twice what the kernels of a softmax are penalized for it.
    strength = l2 * len(x) * (0.5 if num_classes == 2 else 1.0)
    expected = LogisticRegression(
        C=1 / strength,
        tol=1e-8,
        max_iter=10_000,
        class_weight="balanced" if balanced else None,
    ).fit(x, targets)
    kernel, bias = expected.coef_.T, expected.intercept_
    if num_classes == 2:
        kernel, bias = kernel * [-0.5, 0.5], bias * [-0.5, 0.5]

    each = np.ones(num_classes)
    if balanced:
        each = compute_class_weight(
            "balanced", classes=np.arange(num_classes), y=targets
        )

    def cross_entropy(kernel, bias) -> float:
        log_probability = log_softmax(x @ kernel + bias, axis=1)
        right = log_probability[np.arange(len(x)), targets]
        return float(-(each[targets] * right).mean())

    def loss(kernel, bias) -> float:
        return cross_entropy(kernel, bias) + l2 / 2 * float((kernel**2).sum())

    ours = weights_on_standardized(trained, mean, scale)
    best = loss(kernel, bias)
    assert best <= loss(*ours) * (1 + 1e-7)
    assert loss(*ours) == pytest.approx(best, rel=1e-4)
    assert trained.history[0]["loss"] == pytest.approx(cross_entropy(*ours), rel=1e-4)
    assert loss(np.zeros_like(kernel), np.zeros_like(bias)) > 1.05 * best

    probabilities = predict_head(trained.model, features)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, expected.predict_proba(x), atol=5e-3)
    certain = np.abs(np.diff(np.sort(probabilities)[:, -2:], axis=1)[:, 0]) > 5e-3
    predicted = probabilities.argmax(1)
    assert certain.mean() > 0.95
    assert np.array_equal(predicted[certain], expected.predict(x)[certain])


@pytest.mark.parametrize("balanced", [False, True])
def test_a_multi_label_head_is_a_logistic_regression_per_class(balanced):
    features, targets = many_labels(400)
    l2 = 1e-2
    train = labelled(features, targets=targets, num_classes=3, balanced=balanced)
    trained = train_head(HeadConfig(l2=(l2,)), train, None, 0)
    x, mean, scale = standardized(features)
    kernel, bias = weights_on_standardized(trained, mean, scale)
    probabilities = predict_head(trained.model, features)
    for column in range(3):
        expected = LogisticRegression(
            C=1 / (l2 * len(x)),
            tol=1e-8,
            max_iter=10_000,
            class_weight="balanced" if balanced else None,
        ).fit(x, targets[:, column])
        each = np.ones(2)
        if balanced:
            each = compute_class_weight(
                "balanced", classes=np.arange(2), y=targets[:, column]
            )

        def loss(kernel, bias, target=targets[:, column], each=each) -> float:
            logits = x @ kernel + bias
            losses = np.logaddexp(0, logits) - target * logits
            return float((each[target] * losses).mean() + l2 / 2 * (kernel**2).sum())

        best = loss(expected.coef_[0], expected.intercept_[0])
        ours = loss(kernel[:, column], bias[column])
        assert best <= ours * (1 + 1e-7)
        assert ours == pytest.approx(best, rel=1e-4)
        np.testing.assert_allclose(
            probabilities[:, column], expected.predict_proba(x)[:, 1], atol=5e-3
        )


def weights_of(targets, count: int, choice="balanced") -> np.ndarray:
    found = class_weighting(targets, names(count), choice)
    return np.stack([found.absent, found.present])


def test_balanced_weights_are_those_of_scikit_learn():
    targets = np.array([0] * 7 + [1] * 2 + [2], np.int64)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=targets)
    weights = weights_of(targets, 3)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, [expected, expected], rtol=1e-6)
    assert np.mean(weights[1][targets]) == pytest.approx(1.0)
    assert np.array_equal(weights_of(targets, 3, "none"), np.ones((2, 3)))

    many = np.array([[1, 0], [1, 0], [1, 1], [0, 0], [1, 0]], np.uint8)
    for column in range(2):
        expected = compute_class_weight(
            "balanced", classes=np.arange(2), y=many[:, column]
        )
        np.testing.assert_allclose(weights_of(many, 2)[:, column], expected, rtol=1e-6)


def test_weights_by_class_name_are_used_as_they_are():
    targets = np.array([0, 1, 2, 2], np.int64)
    weights = weights_of(targets, 3, {"class 1": 2.5, "class 2": 0.0})
    assert weights.tolist() == [[1, 1, 1], [1, 2.5, 0]]
    with pytest.raises(UsageError, match="'cat'.*class 0, class 1, class 2") as raised:
        weights_of(targets, 3, {"class 1": 2.0, "cat": 1.0})
    assert "\n" not in str(raised.value)


def test_doubling_a_class_weight_is_like_showing_its_images_twice():
    x, y = blobs(200, 3)
    twice = np.concatenate([np.arange(200), np.flatnonzero(y == 1)])
    weighted = LabelledFeatures([x], y, class_weighting(y, names(3), {"class 1": 2.0}))
    repeated = labelled(x[twice], targets=y[twice], num_classes=3)
    # Losses are divided by the number of images, not by their weights.
    l2 = 1e-2 * len(twice) / len(x)
    one = train_head(HeadConfig(l2=(l2,)), weighted, None, 0)
    mean_x = x[twice].mean(0)
    scale = ((x[twice] - mean_x).std() / (x - x.mean(0)).std()) ** 2
    two = train_head(HeadConfig(l2=(1e-2 * scale,)), repeated, None, 0)
    np.testing.assert_allclose(
        predict_head(one.model, x), predict_head(two.model, x), atol=5e-3
    )


def weighted_blobs(weights: np.ndarray) -> LabelledFeatures:
    x, y = blobs(len(weights), 3)
    table = Table(
        tuple(map(str, range(len(y)))), y, ("",) * len(y), weights.astype(np.float32)
    )
    return label_features([x], y, Weighting.equal(3), relative_weights(table))


@pytest.mark.parametrize("unit", [1.0, 0.3, 50.0])
def test_a_sample_weight_of_2_is_like_showing_an_image_twice(unit):
    times = 1 + (np.arange(200) % 3 == 0)
    weighted = weighted_blobs(unit * times)
    x, y = weighted.views[0], weighted.targets
    twice = np.repeat(np.arange(200), times)
    repeated = labelled(x[twice], targets=y[twice], num_classes=3)
    config = HeadConfig(l2=(1e-2,))
    one, two = (train_head(config, data, None, 0) for data in (weighted, repeated))
    said = predict_head(one.model, x)
    np.testing.assert_allclose(said, predict_head(two.model, x), atol=1e-3)
    assert one.history[0]["loss"] == pytest.approx(two.history[0]["loss"], rel=1e-3)
    plain = train_head(config, labelled(x, targets=y, num_classes=3), None, 0)
    assert np.abs(said - predict_head(plain.model, x)).max() > 0.01


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_sample_weights_are_relative_and_draw_a_head_to_their_images(kind):
    y = blobs(200, 3)[1]
    config = HeadConfig(kind=kind, l2=(1e-2,), epochs=8)
    shares, weights = [], []
    for each in (1.0, 5.0, np.where(y == 1, 20.0, 1.0)):
        data = weighted_blobs(np.broadcast_to(each, y.shape))
        head = train_head(config, data, folds(200), 0)
        weights.append(head.model.get_weights()[0])
        shares.append((predict_head(head.model, data.views[0]).argmax(1) == 1).mean())
    np.testing.assert_array_equal(weights[0], weights[1])
    assert shares[2] > shares[0] + 0.1


def test_images_of_weight_0_alone_teach_nothing():
    with pytest.raises(KerasTransferError, match="3 images, all with a sample_weight"):
        weighted_blobs(np.zeros(3))
    table = Table(("1", "2"), np.arange(2), ("", ""), np.zeros(2, np.float32))
    assert relative_weights(table, is_learned=False) is None


def test_a_sample_weight_of_0_leaves_an_image_out():
    x, y = blobs(200, 3)
    kept = np.arange(200) % 3 > 0
    all_features = labelled(x, targets=y, num_classes=3)
    weighted = replace(all_features, sample_weight=kept.astype(np.float32))
    changed = replace(weighted, targets=np.where(kept, y, (y + 1) % 3))
    one, two = (
        train_head(HeadConfig(), data, folds(200), 0) for data in (weighted, changed)
    )
    assert one.l2 == two.l2
    np.testing.assert_array_equal(
        one.model.get_weights()[0], two.model.get_weights()[0]
    )
    full = train_head(HeadConfig(), all_features, folds(200), 0)
    assert not np.allclose(one.model.get_weights()[0], full.model.get_weights()[0])


def test_logit_adjustment_shifts_the_logits_of_a_linear_head_by_class_frequency():
    x, y = blobs(400, 3)
    adjusted = LabelledFeatures([x], y, class_weighting(y, names(3), "none", 0.7))
    plain = labelled(x, targets=y, num_classes=3)
    one, two = (
        train_head(HeadConfig(l2=(1e-2,)), data, None, 0) for data in (adjusted, plain)
    )
    shares = np.bincount(y) / len(y)
    expected = predict_head(two.model, x) * shares**-0.7
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(predict_head(one.model, x), expected, atol=3e-3)
    assert one.history[0]["loss"] == pytest.approx(two.history[0]["loss"], rel=1e-3)
    several = np.eye(3, dtype=np.uint8)
    with pytest.raises(UsageError, match="logit_adjustment=0.7 and multi-label"):
        class_weighting(several, names(3), "none", 0.7)


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_class_without_images_has_finite_weights(multi_label):
    targets = np.array([0, 1, 1], np.int64)
    if multi_label:
        targets = np.array([[1, 0, 1], [1, 0, 0]], np.uint8)
    weights = weights_of(targets, 3)
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()


def data(num_classes: int = 3, balanced: bool = False) -> LabelledFeatures:
    x, y = blobs(300, num_classes)
    return labelled(x, targets=y, num_classes=num_classes, balanced=balanced)


@pytest.mark.parametrize("config", [HeadConfig(), SHORT_MLP], ids=["linear", "mlp"])
def test_two_runs_give_the_same_bits(config):
    heads = [train_head(config, data(), folds(300), seed=3) for _ in range(2)]
    first, second = (head.model.get_weights() for head in heads)
    assert heads[0].history == heads[1].history
    for one, other in zip(first, second, strict=True):
        assert one.tobytes() == other.tobytes()
    assert (
        heads[0].out_of_fold.probabilities.tobytes()
        == heads[1].out_of_fold.probabilities.tobytes()
    )


def test_the_seed_matters_to_an_mlp_only():
    for config, same in ((HeadConfig(l2=(0.1,)), True), (SHORT_MLP, False)):
        one, other = (
            train_head(config, data(), folds(300), seed=s).model for s in (0, 1)
        )
        assert np.array_equal(one.get_weights()[0], other.get_weights()[0]) == same


def out_of_fold_loss(labelled: LabelledFeatures, probabilities: np.ndarray) -> float:
    """The mean weighted cross-entropy, by scipy."""
    targets, weights = labelled.labels(slice(None))
    said = probabilities.astype(np.float64)
    losses = -xlogy(targets, said)
    if labelled.multi_label:
        losses -= xlogy(1 - targets, 1 - said)
    return float((weights * losses).sum(1).mean())


@pytest.mark.parametrize(
    ("config", "grid"),
    [(HeadConfig(), LINEAR_L2), (MLP.model_copy(update={"l2": None}), MLP_L2)],
    ids=["linear", "mlp"],
)
@pytest.mark.parametrize("balanced", [False, True])
def test_the_head_with_the_lowest_out_of_fold_loss_is_kept(config, grid, balanced):
    train, told = data(balanced=balanced), Told()
    trained = train_head(config, train, folds(300), 0, told)
    strengths = list(dict.fromkeys(row["l2"] for row in trained.history))
    assert strengths == sorted(grid, reverse=True)[: len(strengths)]
    assert told.steps == [("head", i + 1, len(grid)) for i in range(len(strengths))]
    assert told.epochs == [("fit", row["epoch"], row) for row in trained.history]
    assert len(strengths) > 1
    found = trained.out_of_fold
    losses = [row["val_loss"] for row in trained.history]
    assert found.chosen == int(np.argmin(losses))
    assert trained.l2 == trained.history[found.chosen]["l2"]
    assert found.probabilities.shape == (len(losses), 300, 3)
    for loss, said in zip(losses, found.probabilities, strict=True):
        assert out_of_fold_loss(train, said) == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(found.losses.mean(1), losses, rtol=1e-5)
    assert list(trained.history[0]) == ["l2", "epoch", "loss", "val_loss"]


@pytest.mark.parametrize("config", [HeadConfig(l2=(1e-2,)), SHORT_MLP])
def test_out_of_fold_predictions_do_not_depend_on_the_labels_of_the_fold(config):
    x, y = blobs(300, 3)
    numbers = folds(300)
    wrong = np.where(numbers == 1, (y + 1) % 3, y)
    one, two = (
        train_head(
            config.model_copy(update={"l2": (1e-2,)}),
            labelled(x, targets=targets, num_classes=3),
            numbers,
            0,
        ).out_of_fold.probabilities[0]
        for targets in (y, wrong)
    )
    held_out = numbers == 1
    # Heads are solved together: how far each converges depends a little on the others.
    np.testing.assert_allclose(one[held_out], two[held_out], atol=5e-3)
    assert np.abs(one[~held_out] - two[~held_out]).max() > 0.05


def test_each_fold_is_predicted_by_the_optimum_of_the_other_folds():
    x, y = blobs(300, 3)
    numbers = folds(300)
    config = HeadConfig(l2=(1e-1,))
    trained = train_head(config, labelled(x, targets=y, num_classes=3), numbers, 0)
    scaled, _, _ = standardized(x)
    for fold in range(3):
        inside = numbers != fold
        expected = LogisticRegression(
            C=1 / (1e-1 * inside.sum()), tol=1e-8, max_iter=10_000
        ).fit(scaled[inside], y[inside])
        np.testing.assert_allclose(
            trained.out_of_fold.probabilities[0][~inside],
            expected.predict_proba(scaled[~inside]),
            atol=5e-3,
        )


@pytest.mark.parametrize("images", [1, 40])
def test_features_that_are_all_alike_say_nothing(images):
    x = np.full((images, FEATURES), 3, np.float32)
    train = labelled(x, targets=np.arange(images) % 2, num_classes=2)
    numbers = folds(images) if images > 1 else None
    probabilities = predict_head(train_head(HeadConfig(), train, numbers, 0).model, x)
    shares = np.bincount(train.targets, minlength=2) / images
    assert np.abs(probabilities - shares).max() < 0.05


WIDTHS = (2, FEATURES - 2)


def scaled_alike(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean, and each pooled output's deviation, smaller ones scaled down less."""
    mean = features.mean(0, dtype=np.float64)
    ends = np.cumsum(WIDTHS)
    scale = np.empty(FEATURES)
    for start, end in zip([0, *ends], ends, strict=False):
        part = features[:, start:end] - mean[start:end]
        share = (end - start) / WIDTHS[-1]
        scale[start:end] = np.sqrt(part.var(0).mean()) * share**0.25
    return mean, scale


@pytest.mark.parametrize("has_basis", [True, False])
def test_pooled_outputs_are_scaled_by_the_images_of_each_head_alone(
    monkeypatch, has_basis
):
    if not has_basis:
        monkeypatch.setattr(linear, "MOST_DIRECTIONS", 1)
    features, targets = blobs(60, 3)
    features[:, : WIDTHS[0]] *= 40
    numbers = folds(60)
    features[numbers == 1, 0] *= 3  # one fold is spread more
    data = labelled(features, targets=targets, num_classes=3)
    data = replace(data, widths=WIDTHS)
    trained = train_head(HeadConfig(l2=(1e-1,)), data, numbers, 0)
    assert trained.out_of_fold is not None

    def optimum(rows: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """What the optimum of the rows says of all images, by scikit-learn."""
        x = (features - mean) / scale
        model = LogisticRegression(C=1 / (1e-1 * len(rows)), tol=1e-9, max_iter=10_000)
        return model.fit(x[rows], targets[rows]).predict_proba(x)

    mean, scale = scaled_alike(features)
    for fold in range(3):
        rows, own = np.flatnonzero(numbers != fold), numbers == fold
        said = trained.out_of_fold.probabilities[0, own]
        expected = optimum(rows, *scaled_alike(features[rows]))[own]
        np.testing.assert_allclose(said, expected, atol=0.015)
        if fold == 1:
            assert np.abs(said - optimum(rows, mean, scale)[own]).max() > 0.05

    expected = optimum(np.arange(60), mean, scale)
    layer = trained.model.get_layer("spread")
    np.testing.assert_allclose(np.ravel(layer.mean), mean, rtol=1e-5)
    np.testing.assert_allclose(np.sqrt(np.ravel(layer.variance)), scale, rtol=1e-5)
    np.testing.assert_allclose(
        predict_head(trained.model, features), expected, atol=2e-3
    )


def test_an_mlp_scales_pooled_outputs_too():
    features, targets = blobs(60, 3)
    rescaled = features.copy()
    rescaled[:, : WIDTHS[0]] = 1000 * (rescaled[:, : WIDTHS[0]] - 7)
    said = []
    for x in (features, rescaled):
        data = labelled(x, targets=targets, num_classes=3)
        data = replace(data, widths=WIDTHS)
        trained = train_head(SHORT_MLP, data, folds(60), 0)
        assert trained.out_of_fold is not None
        said.append(trained.out_of_fold.probabilities[-1])
        np.testing.assert_allclose(
            predict_head(trained.model, x).sum(1), np.ones(60), atol=1e-5
        )
    np.testing.assert_allclose(said[0], said[1], atol=1e-3)


def test_without_a_basis_the_same_optimum_is_found(monkeypatch):
    train = data()
    config = HeadConfig(l2=(1e-2,))
    expected = train_head(config, train, folds(300), 0)
    monkeypatch.setattr(linear, "MOST_DIRECTIONS", 5)
    found = train_head(config, train, folds(300), 0)
    for one, other in zip(
        found.model.get_weights(), expected.model.get_weights(), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=5e-3)


def test_images_in_no_fold_are_learned_from_by_all_and_not_predicted():
    x, y = blobs(300, 3)
    numbers = np.where(np.arange(300) < 30, 0, -1)
    train = labelled(x, targets=y, num_classes=3)
    found = train_head(HeadConfig(), train, numbers, 0).out_of_fold
    assert found.probabilities.shape[1:] == (30, 3)
    assert np.isfinite(found.probabilities).all()
    assert found.rows.tolist() == list(range(30))


def test_the_metric_that_is_asked_for_chooses_among_all_strengths():
    x, y = blobs(300, 3)
    train = labelled(x, targets=y, num_classes=3)
    for metric in ("accuracy", "balanced_accuracy", "macro_f1", "log_loss", "auc"):
        trained = train_head(HeadConfig(), train, folds(300), 0, metric=metric)
        figures = [score(metric, y, p) for p in trained.out_of_fold.probabilities]
        assert figures[trained.out_of_fold.chosen] == max(figures)
        assert len(figures) == len(LINEAR_L2)


def test_the_search_stops_when_weaker_strengths_only_get_worse():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, FEATURES)).astype(np.float32)
    noise = labelled(x, targets=rng.integers(0, 2, 60), num_classes=2)
    trained = train_head(HeadConfig(), noise, folds(60), 0)
    strengths = [row["l2"] for row in trained.history]
    assert len(strengths) < len(LINEAR_L2)
    losses = [row["val_loss"] for row in trained.history]
    assert losses[-1] > 1.01 * min(losses)


def test_l2_shrinks_the_kernels_of_an_mlp():
    norms = []
    for l2 in (1e-6, 0.3):
        config = MLP.model_copy(update={"l2": (l2,), "hidden": (8, 8), "epochs": 10})
        kernels = train_head(config, data(), None, 0).model.get_weights()[::2]
        # The first layer has taken over the scaling of the features.
        norms.append([float((kernel**2).sum()) for kernel in kernels])
    assert all(strong < 0.7 * weak for weak, strong in zip(*norms, strict=True))


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("config", [HeadConfig(), SHORT_MLP], ids=["linear", "mlp"])
def test_streamed_features_give_the_same_head(tmp_path, config, views):
    train = data()
    tables = []
    for view in range(views):
        spec = FeatureSpec("base", "", 1, "", "f32", 1, view)
        table = FeatureCache(tmp_path).table(spec)
        for i, row in enumerate(train.views[0]):
            table.add(b"t%031d" % i, row + view * (i % 3))
            if i % 70 == 0:
                table.flush()
        table.flush()
        tables.append(table)

    def head(in_memory_bytes: int, chunk_rows: int) -> TrainedHead:
        found = [
            table.features([b"t%031d" % i for i in range(300)]) for table in tables
        ]
        part = label_features(
            found, train.targets, train.weighting, in_memory_bytes=in_memory_bytes
        )
        kinds.append(type(part.views[0]).__name__)
        return train_head(
            config, replace(part, chunk_rows=chunk_rows), folds(300), seed=0
        )

    kinds: list[str] = []
    in_memory = head(IN_MEMORY_BYTES, CHUNK_ROWS)
    streamed = head(0, 37)
    assert kinds == ["ndarray", "CachedFeatures"]
    assert streamed.l2 == in_memory.l2
    x = train.views[0]
    one, other = (predict_head(h.model, x) for h in (streamed, in_memory))
    np.testing.assert_allclose(one, other, atol=2e-3)
    np.testing.assert_allclose(
        streamed.out_of_fold.probabilities[streamed.out_of_fold.chosen],
        in_memory.out_of_fold.probabilities[in_memory.out_of_fold.chosen],
        atol=2e-3,
    )


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        (HeadConfig(), LINEAR_L2),
        (MLP.model_copy(update={"l2": None}), MLP_L2),
        (HeadConfig(l2=(0.03, 0.01, 0.02)), [0.02]),
    ],
    ids=["linear", "mlp", "own grid"],
)
def test_without_folds_the_middle_strength_is_taken(config, grid):
    trained = train_head(config, data(), None, 0)
    assert {row["l2"] for row in trained.history} == {trained.l2}
    assert trained.l2 == sorted(grid)[len(grid) // 2]
    assert trained.out_of_fold is None
    x, y = blobs(150, 3, seed=1)
    assert accuracy(trained, x, y) > 0.7


def xor(count: int, seed: int):
    x = np.random.default_rng(seed).uniform(-1, 1, (count, 2)).astype(np.float32)
    x += 0.1 * np.sign(x)
    return x * 4 + 2, (x[:, 0] * x[:, 1] > 0).astype(np.int64)


XOR_MLP = HeadConfig(
    kind="mlp",
    hidden=(32,),
    dropout=0.0,
    learning_rate=0.1,
    epochs=30,
    l2=(1e-4,),
)


def accuracy(trained: TrainedHead, features, targets) -> float:
    return float((predict_head(trained.model, features).argmax(1) == targets).mean())


def test_an_mlp_learns_what_a_linear_head_cannot():
    (x, y), (new_x, new_y) = xor(600, 0), xor(200, 1)
    train = labelled(x, targets=y, num_classes=2)
    assert accuracy(train_head(HeadConfig(), train, folds(600), 0), new_x, new_y) < 0.7
    assert accuracy(train_head(XOR_MLP, train, folds(600), 0), new_x, new_y) > 0.95


def test_views_count_like_images_of_their_own():
    x, y = blobs(300, 2)
    other = x + np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
    views = labelled(x, other, targets=y, num_classes=2)
    stacked = np.concatenate([x, other])
    images = labelled(stacked, targets=np.tile(y, 2), num_classes=2)
    assert len(views) == len(images) == 600
    config = HeadConfig(l2=(1e-3,))
    one, two = (train_head(config, part, None, 0).model for part in (views, images))
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_an_mlp_learns_from_all_views():
    (x, y), (new_x, new_y) = xor(600, 0), xor(200, 1)
    # Each view shows one half of the plane; only both together tell the rule.
    right = np.where(x[:, :1] > 2, x, 4 - x)
    both = labelled(right, 4 - right, targets=y, num_classes=2)
    half = labelled(right, targets=y, num_classes=2)
    assert accuracy(train_head(XOR_MLP, both, None, 0), new_x, new_y) > 0.95
    assert accuracy(train_head(XOR_MLP, half, None, 0), new_x, new_y) < 0.85


@pytest.mark.parametrize("config", [HeadConfig(), MLP], ids=["linear", "mlp"])
def test_epochs_cap_the_training(config):
    capped = config.model_copy(update={"epochs": 2})
    rows = train_head(capped, data(), folds(300), seed=0).history
    assert max(row["epoch"] for row in rows) == 2


def test_the_linear_head_converges_by_itself():
    rows = train_head(HeadConfig(), data(), folds(300), seed=0).history
    assert 2 < max(row["epoch"] for row in rows) < HeadConfig().epochs


@pytest.mark.parametrize("config", [HeadConfig(), MLP], ids=["linear", "mlp"])
def test_a_multi_label_head_predicts_each_class_by_itself(config):
    (x, y), (new_x, new_y) = many_labels(400), many_labels(300, seed=1)
    train = labelled(x, targets=y, num_classes=3)
    trained = train_head(config, train, folds(400), 0)
    probabilities = predict_head(trained.model, new_x)
    assert np.ptp(probabilities.sum(1)) > 0.5
    right = ((probabilities > 0.5) == new_y).mean(0)
    assert (right > np.maximum(new_y.mean(0), 1 - new_y.mean(0)) + 0.05).all()
    found = trained.out_of_fold
    assert out_of_fold_loss(train, found.probabilities[found.chosen]) == pytest.approx(
        min(row["val_loss"] for row in trained.history), rel=1e-5
    )


def test_no_rows_have_no_predictions():
    trained = train_head(HeadConfig(l2=(1.0,)), data(), None, seed=0)
    nothing = predict_head(trained.model, np.zeros((0, FEATURES), np.float32))
    assert (nothing.shape, nothing.dtype) == ((0, 3), np.float32)


def test_predictions_do_not_depend_on_the_chunks():
    train = data()
    trained = train_head(HeadConfig(l2=(1.0,)), train, None, 0)
    whole = predict_head(trained.model, train.views[0])
    np.testing.assert_allclose(whole.sum(1), 1, rtol=1e-5)
    chunked = predict_head(trained.model, train.views[0], chunk_rows=7)
    np.testing.assert_allclose(chunked, whole, atol=1e-6)


def test_a_class_that_train_lacks_weighs_nothing_and_changes_no_other_weight():
    targets = np.array([0] * 30 + [1] * 10)
    np.testing.assert_array_equal(weights_of(targets, 3)[:, :2], weights_of(targets, 2))
    assert weights_of(targets, 3)[:, 2].tolist() == [0, 0]
    several = np.array([[1, 0]] * 3 + [[0, 0]])
    absent, present = weights_of(several, 2)
    np.testing.assert_allclose(present, [4 / 6, 0])
    np.testing.assert_allclose(absent, [2, 0.5])
