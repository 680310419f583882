"""Head: the optimum scikit-learn finds, the same bits every time."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import Told
from scipy.special import log_softmax, xlogy
from sklearn.linear_model import LogisticRegression
from sklearn.utils import compute_class_weight

from keras_transfer.config import HeadConfig
from keras_transfer.features.cache import FeatureCache
from keras_transfer.features.shards import FeatureSpec
from keras_transfer.training.head import (
    CHUNK_ROWS,
    IN_MEMORY_BYTES,
    LINEAR_L2,
    MIN_DELTA,
    MLP_L2,
    LabelledFeatures,
    TrainedHead,
    class_weights,
    label_features,
    predict_head,
    train_head,
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


def labelled(*views, targets, num_classes, balanced=False) -> LabelledFeatures:
    weights = class_weights(targets, num_classes, balanced)
    return LabelledFeatures(views, targets, num_classes, weights)


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
    trained = train_head(HeadConfig(l2=(l2,)), train, train, 0)
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
    trained = train_head(HeadConfig(l2=(l2,)), train, train, 0)
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


def test_balanced_weights_are_those_of_scikit_learn():
    targets = np.array([0] * 7 + [1] * 2 + [2], np.int64)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=targets)
    weights = class_weights(targets, 3, balanced=True)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, [expected, expected], rtol=1e-6)
    assert np.mean(weights[1][targets]) == pytest.approx(1.0)
    assert np.array_equal(class_weights(targets, 3, False), np.ones((2, 3)))

    many = np.array([[1, 0], [1, 0], [1, 1], [0, 0], [1, 0]], np.uint8)
    for column in range(2):
        expected = compute_class_weight(
            "balanced", classes=np.arange(2), y=many[:, column]
        )
        np.testing.assert_allclose(
            class_weights(many, 2, balanced=True)[:, column], expected, rtol=1e-6
        )


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_class_without_images_has_finite_weights(multi_label):
    targets = np.array([0, 1, 1], np.int64)
    if multi_label:
        targets = np.array([[1, 0, 1], [1, 0, 0]], np.uint8)
    weights = class_weights(targets, 3, balanced=True)
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()


def split(num_classes: int = 3, balanced: bool = False):
    """(train, val) of one distribution."""
    parts = [blobs(300, num_classes), blobs(150, num_classes, seed=1)]
    return [
        labelled(x, targets=y, num_classes=num_classes, balanced=balanced)
        for x, y in parts
    ]


@pytest.mark.parametrize("config", [HeadConfig(), SHORT_MLP], ids=["linear", "mlp"])
def test_two_runs_give_the_same_bits(config):
    heads = [train_head(config, *split(), seed=3) for _ in range(2)]
    first, second = (head.model.get_weights() for head in heads)
    assert heads[0].history == heads[1].history
    for one, other in zip(first, second, strict=True):
        assert one.tobytes() == other.tobytes()


def test_the_seed_matters_to_an_mlp_only():
    for config, same in ((HeadConfig(l2=(0.1,)), True), (SHORT_MLP, False)):
        one, other = (train_head(config, *split(), seed=s).model for s in (0, 1))
        assert np.array_equal(one.get_weights()[0], other.get_weights()[0]) == same


def validation_loss(head, val: LabelledFeatures) -> float:
    probabilities = predict_head(head, val.views[0]).astype(np.float64)
    targets, weights = val.labels(slice(None))
    losses = -xlogy(targets, probabilities)
    if val.multi_label:
        losses -= xlogy(1 - targets, 1 - probabilities)
    return float((weights * losses).sum(1).mean())


@pytest.mark.parametrize(
    ("config", "grid", "exact"),
    [
        (HeadConfig(), LINEAR_L2, 1e-5),
        (MLP.model_copy(update={"l2": None}), MLP_L2, 2 * MIN_DELTA),
    ],
    ids=["linear", "mlp"],
)
@pytest.mark.parametrize("balanced", [False, True])
def test_the_strength_with_the_lowest_validation_loss_is_kept(
    config, grid, exact, balanced
):
    train, val = split(balanced=balanced)
    told = Told()
    trained = train_head(config, train, val, 0, told)
    strengths = list(dict.fromkeys(row["l2"] for row in trained.history))
    assert strengths == sorted(grid, reverse=True)[: len(strengths)]
    assert told.steps == [("head", i + 1, len(grid)) for i in range(len(strengths))]
    assert told.epochs == [("fit", row["epoch"], row) for row in trained.history]
    assert len(strengths) > 2
    best = min(trained.history, key=lambda row: row["val_loss"])
    assert trained.l2 == best["l2"]
    assert validation_loss(trained.model, val) == pytest.approx(
        best["val_loss"], abs=exact
    )
    assert list(best) == ["l2", "epoch", "loss", "val_loss"]


def test_the_search_stops_when_weaker_strengths_only_get_worse():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, FEATURES)).astype(np.float32)
    noise = labelled(x[:30], targets=np.arange(30) % 2, num_classes=2)
    other = labelled(x[30:], targets=np.arange(30) % 2, num_classes=2)
    trained = train_head(HeadConfig(), noise, other, 0)
    strengths = [row["l2"] for row in trained.history]
    assert len(strengths) == strengths.index(trained.l2) + 4 < len(LINEAR_L2)


def test_l2_shrinks_the_kernels_of_an_mlp():
    train, val = split()
    norms = []
    for l2 in (1e-6, 0.3):
        config = MLP.model_copy(
            update={"l2": (l2,), "hidden": (8, 8), "epochs": 10, "patience": 10}
        )
        kernels = train_head(config, train, val, 0).model.get_weights()[::2]
        # The first layer has taken over the scaling of the features.
        norms.append([float((kernel**2).sum()) for kernel in kernels])
    assert all(strong < 0.7 * weak for weak, strong in zip(*norms, strict=True))


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("config", [HeadConfig(), SHORT_MLP], ids=["linear", "mlp"])
def test_streamed_features_give_the_same_head(tmp_path, config, views):
    train, val = split()
    tables = []
    for view in range(views):
        spec = FeatureSpec("base", "", 1, "", "f32", 1, view)
        table = FeatureCache(tmp_path).table(spec)
        for data, name in ((train, b"t"), (val, b"v")):
            for i, row in enumerate(data.views[0]):
                table.add(name + b"%031d" % i, row + view * (i % 3))
                if i % 70 == 0:
                    table.flush()
        table.flush()
        tables.append(table)

    def head(in_memory_bytes: int, chunk_rows: int) -> TrainedHead:
        parts = []
        for data, name, used in ((train, b"t", tables), (val, b"v", tables[:1])):
            names = [name + b"%031d" % i for i in range(len(data.targets))]
            part = label_features(
                [table.features(names) for table in used],
                data.targets,
                data.num_classes,
                data.class_weights,
                in_memory_bytes,
            )
            parts.append(replace(part, chunk_rows=chunk_rows))
        kinds.append(type(parts[0].views[0]).__name__)
        return train_head(config, *parts, seed=0)

    kinds: list[str] = []
    in_memory = head(IN_MEMORY_BYTES, CHUNK_ROWS)
    streamed = head(0, 37)
    assert kinds == ["ndarray", "Features"]
    assert streamed.l2 == in_memory.l2
    one, other = (predict_head(h.model, val.views[0]) for h in (streamed, in_memory))
    np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        (HeadConfig(), LINEAR_L2),
        (MLP.model_copy(update={"l2": None}), MLP_L2),
        (HeadConfig(l2=(0.03, 0.01, 0.02)), [0.02]),
    ],
    ids=["linear", "mlp", "own grid"],
)
def test_without_validation_images_the_middle_strength_is_taken(config, grid):
    train, val = split()
    nothing = labelled(
        val.views[0][:0], targets=val.targets[:0], num_classes=val.num_classes
    )
    trained = train_head(config, train, nothing, 0)
    assert {row["l2"] for row in trained.history} == {trained.l2}
    assert trained.l2 == sorted(grid)[len(grid) // 2]
    predicted = predict_head(trained.model, val.views[0]).argmax(1)
    assert (predicted == val.targets).mean() > 0.7


def xor(count: int, seed: int):
    x = np.random.default_rng(seed).uniform(-1, 1, (count, 2)).astype(np.float32)
    x += 0.1 * np.sign(x)
    return x * 4 + 2, (x[:, 0] * x[:, 1] > 0).astype(np.int64)


XOR_MLP = HeadConfig(
    kind="mlp",
    hidden=(32,),
    dropout=0.0,
    learning_rate=0.1,
    epochs=10,
    patience=10,
    l2=(1e-4,),
)


def accuracy(trained: TrainedHead, features, targets) -> float:
    return float((predict_head(trained.model, features).argmax(1) == targets).mean())


def test_an_mlp_learns_what_a_linear_head_cannot():
    (x, y), (val_x, val_y) = xor(600, 0), xor(200, 1)
    train = labelled(x, targets=y, num_classes=2)
    val = labelled(val_x, targets=val_y, num_classes=2)
    assert accuracy(train_head(HeadConfig(), train, val, 0), val_x, val_y) < 0.7
    assert accuracy(train_head(XOR_MLP, train, val, 0), val_x, val_y) > 0.95


def test_views_count_like_images_of_their_own():
    x, y = blobs(300, 2)
    other = x + np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
    views = labelled(x, other, targets=y, num_classes=2)
    stacked = np.concatenate([x, other])
    images = labelled(stacked, targets=np.tile(y, 2), num_classes=2)
    assert len(views) == len(images) == 600
    config = HeadConfig(l2=(1e-3,))
    one, two = (train_head(config, data, images, 0).model for data in (views, images))
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_mlp_learns_from_all_views():
    (x, y), (val_x, val_y) = xor(600, 0), xor(200, 1)
    val = labelled(val_x, targets=val_y, num_classes=2)
    # Each view shows one half of the plane; only both together tell the rule.
    right = np.where(x[:, :1] > 2, x, 4 - x)
    both = labelled(right, 4 - right, targets=y, num_classes=2)
    half = labelled(right, targets=y, num_classes=2)
    assert accuracy(train_head(XOR_MLP, both, val, 0), val_x, val_y) > 0.95
    assert accuracy(train_head(XOR_MLP, half, val, 0), val_x, val_y) < 0.85


@pytest.mark.parametrize("config", [HeadConfig(), MLP], ids=["linear", "mlp"])
def test_epochs_cap_the_training(config):
    capped = config.model_copy(update={"epochs": 2})
    rows = train_head(capped, *split(), seed=0).history
    assert max(row["epoch"] for row in rows) == 2


def test_the_linear_head_converges_by_itself():
    rows = train_head(HeadConfig(), *split(), seed=0).history
    assert 2 < max(row["epoch"] for row in rows) < HeadConfig().epochs


def test_an_mlp_stops_when_validation_no_longer_improves():
    config = MLP.model_copy(update={"patience": 2, "l2": (1e-5,), "epochs": 100})
    rows = train_head(config, *split(), seed=0).history
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    assert 3 < len(rows) < config.epochs
    best = min(row["val_loss"] for row in rows[:-2])
    assert min(row["val_loss"] for row in rows[-2:]) > best - MIN_DELTA


@pytest.mark.parametrize("config", [HeadConfig(), MLP], ids=["linear", "mlp"])
def test_a_multi_label_head_predicts_each_class_by_itself(config):
    (x, y), (val_x, val_y) = many_labels(400), many_labels(300, seed=1)
    train = labelled(x, targets=y, num_classes=3)
    val = labelled(val_x, targets=val_y, num_classes=3)
    trained = train_head(config, train, val, 0)
    probabilities = predict_head(trained.model, val_x)
    assert np.ptp(probabilities.sum(1)) > 0.5
    right = ((probabilities > 0.5) == val_y).mean(0)
    assert (right > np.maximum(val_y.mean(0), 1 - val_y.mean(0)) + 0.05).all()
    best = min(row["val_loss"] for row in trained.history)
    assert validation_loss(trained.model, val) == pytest.approx(best, abs=2e-3)


def test_no_rows_have_no_predictions():
    trained = train_head(HeadConfig(l2=(1.0,)), *split(), seed=0)
    nothing = predict_head(trained.model, np.zeros((0, FEATURES), np.float32))
    assert (nothing.shape, nothing.dtype) == ((0, 3), np.float32)


def test_predictions_do_not_depend_on_the_chunks():
    train, val = split()
    trained = train_head(HeadConfig(l2=(1.0,)), train, val, 0)
    whole = predict_head(trained.model, train.views[0])
    np.testing.assert_allclose(whole.sum(1), 1, rtol=1e-5)
    chunked = predict_head(trained.model, train.views[0], chunk_rows=7)
    np.testing.assert_allclose(chunked, whole, atol=1e-6)


def test_a_class_that_train_lacks_weighs_nothing_and_changes_no_other_weight():
    targets = np.array([0] * 30 + [1] * 10)
    np.testing.assert_array_equal(
        class_weights(targets, 3, balanced=True)[:, :2],
        class_weights(targets, 2, balanced=True),
    )
    assert class_weights(targets, 3, balanced=True)[:, 2].tolist() == [0, 0]
    several = np.array([[1, 0]] * 3 + [[0, 0]])
    absent, present = class_weights(several, 2, balanced=True)
    np.testing.assert_allclose(present, [4 / 6, 0])
    np.testing.assert_allclose(absent, [2, 0.5])
