"""Mlp heads of all folds at once: what Adam finds, and no head knows its fold."""

import itertools
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.special import expit, softmax
from sklearn.decomposition import PCA
from sklearn.metrics import log_loss

from keras_transfer.config import HeadConfig
from keras_transfer.errors import UsageError
from keras_transfer.features.cache import FeatureCache
from keras_transfer.features.shards import FeatureSpec
from keras_transfer.models.classifier import build_head
from keras_transfer.training.head import predict_head
from keras_transfer.training.labelled import LabelledFeatures, class_weighting
from keras_transfer.training.mlp import MIN_DELTA, mlp_candidates

FEATURES = 12
CHECKPOINTS = [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128]


def mlp(**options) -> HeadConfig:
    """A small mlp that takes all epochs it may."""
    given = {"hidden": (16,), "learning_rate": 0.01, "epochs": 11, "patience": 999}
    return HeadConfig(kind="mlp", **(given | options))


def blobs(count: int, num_classes: int = 3, features: int = FEATURES, seed: int = 0):
    """Overlapping classes, features far from centred or scaled."""
    centers = np.random.default_rng(99).normal(size=(num_classes, features))
    rng = np.random.default_rng(seed)
    targets = rng.integers(num_classes, size=count)
    x = centers[targets] + 1.5 * rng.normal(size=(count, features))
    return (3 * x + 5).astype(np.float32), targets


def many_labels(count: int, seed: int = 0):
    """Three classes that come in any combination."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, FEATURES))
    targets = x[:, :3] + 0.5 * rng.normal(size=(count, 3)) > [0.0, 0.8, -0.5]
    return (3 * x + 5).astype(np.float32), targets.astype(np.uint8)


def labelled(*views, targets, num_classes=3, balanced=False) -> LabelledFeatures:
    names = [f"class {i}" for i in range(num_classes)]
    choice = "balanced" if balanced else "none"
    return LabelledFeatures(views, targets, class_weighting(targets, names, choice))


def thirds(count: int) -> np.ndarray:
    return np.random.default_rng(7).permutation(np.arange(count) % 3)


def predict(config: HeadConfig, weights, x, num_classes=3, multi_label=False):
    """Predictions of the model that the weights are for."""
    head = build_head(config, x.shape[1], num_classes, multi_label)
    head.set_weights(weights)
    return predict_head(head, x)


def with_adam(data: LabelledFeatures, start, l2: float, learning_rate: float, steps):
    """Full-batch Adam on the principal components, by TensorFlow's own gradients."""
    x = data.views[0].astype(np.float64)
    pca = PCA().fit(x)
    components = pca.transform(x)
    axes = pca.components_.T / components.std()
    components = tf.constant(components / components.std(), tf.float32)
    targets, weights = data.labels(slice(None))
    offset = data.weighting.logit_offset
    # A raw kernel is axes @ kernel.
    kernel = np.linalg.lstsq(axes, start[0], rcond=None)[0]
    bias = start[1] + x.mean(0) @ start[0]
    parameters = [tf.Variable(p, dtype="float32") for p in (kernel, bias, *start[2:])]
    adam = keras.optimizers.Adam(learning_rate)
    for step in range(steps + 1):
        with tf.GradientTape() as tape:
            logits = components
            for index, (k, b) in enumerate(
                zip(parameters[::2], parameters[1::2], strict=True)
            ):
                logits = (tf.nn.relu(logits) if index else logits) @ k + b
            logits += offset
            if data.multi_label:
                losses = tf.nn.sigmoid_cross_entropy_with_logits(targets, logits)
            else:
                losses = -targets * tf.nn.log_softmax(logits)
            cross_entropy = tf.reduce_sum(weights * losses) / len(x)
            loss = cross_entropy
            for k in parameters[::2]:
                loss += l2 / 2 * tf.reduce_sum(k**2)
        if step < steps:
            adam.apply(tape.gradient(loss, parameters), parameters)
    kernel, bias, *others = (parameter.numpy() for parameter in parameters)
    raw = axes @ kernel
    return [raw, bias - x.mean(0) @ raw, *others], float(cross_entropy)


@pytest.mark.parametrize(
    ("kind", "adjusted", "hidden"),
    [
        ("single", False, (400,)),
        ("single", True, (8, 6, 5)),
        ("balanced", True, (80, 5)),
        ("multi", False, (8,)),
        ("multi", True, (8, 5)),
    ],
)
def test_weights_and_loss_are_those_of_tensorflow(kind, adjusted, hidden):
    if kind == "multi":
        x, y = many_labels(120)
    else:
        x, y = blobs(120, features=50)
        y[:60] = 0
    data = labelled(x, targets=y, balanced=kind != "single")
    if adjusted:
        offset = np.array([1.0, -2.0, 0.3], np.float32)
        data = replace(data, weighting=replace(data.weighting, logit_offset=offset))
    config = mlp(hidden=hidden, dropout=0.0, epochs=9)
    l2 = 0.03
    nothing = config.model_copy(update={"learning_rate": 1e-12})
    (start,) = mlp_candidates(nothing, data, None, seed=3)(l2)
    (ours,) = mlp_candidates(config, data, None, seed=3)(l2)
    expected, loss = with_adam(data, start.weights, l2, config.learning_rate, 9)
    for a, b, before in zip(ours.weights, expected, start.weights, strict=True):
        assert a.dtype == np.float32
        # Where a unit is at the kink of its ReLU, rounding decides.
        assert np.linalg.norm(a - b) < 2e-3 * np.linalg.norm(a - before)
    assert ours.loss == pytest.approx(loss, rel=1e-4)
    assert ours.epoch == 9
    assert np.isnan(ours.val_loss)
    assert ours.out_of_fold is None


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_fold_is_predicted_by_what_is_trained_without_it(multi_label):
    x, y = many_labels(150) if multi_label else blobs(150)
    folds = thirds(150)
    # One minibatch, so that the order of images does not matter.
    config = mlp(dropout=0.0)
    data = labelled(x, targets=y)
    last = list(mlp_candidates(config, data, folds, seed=1)(0.01))[-1]
    for fold in range(3):
        rest = replace(data, views=[x[folds != fold]], targets=y[folds != fold])
        (alone,) = mlp_candidates(config, rest, None, seed=1)(0.01)
        expected = predict(config, alone.weights, x[folds == fold], 3, multi_label)
        np.testing.assert_allclose(last.out_of_fold[folds == fold], expected, atol=1e-4)
    (of_all,) = mlp_candidates(config, data, None, seed=1)(0.01)
    for a, b in zip(last.weights, of_all.weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert last.loss == pytest.approx(of_all.loss, abs=1e-5)


def test_no_head_knows_anything_of_its_fold():
    x, y = blobs(700)
    other_view = x + np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
    folds = thirds(700)
    in_fold = folds == 1
    changed_x, changed_view, changed_y = x.copy(), other_view.copy(), y.copy()
    changed_y[in_fold] = (y[in_fold] + 1) % 3
    changed_view[in_fold] *= -100
    half = in_fold & (np.arange(700) % 2 == 0)
    changed_x[half] += 1000
    config = mlp(epochs=3)
    before, after = (
        list(mlp_candidates(config, labelled(*views, targets=t), folds, 0)(0.01))
        for views, t in (
            ((x, other_view), y),
            ((changed_x, changed_view), changed_y),
        )
    )
    same = in_fold & ~half
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one.out_of_fold[same], other.out_of_fold[same])
        assert not np.allclose(
            one.out_of_fold[folds == 0], other.out_of_fold[folds == 0], atol=0.05
        )
        assert not np.allclose(one.weights[0], other.weights[0], atol=1e-3)


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_out_of_fold_loss_is_that_of_the_predictions(multi_label):
    x, y = many_labels(200) if multi_label else blobs(200)
    data = labelled(x, targets=y, balanced=True)
    folds = thirds(200)
    folds[:50] = -1
    offset = np.array([0.5, -1.0, 0.0], np.float32)
    adjusted = replace(data, weighting=replace(data.weighting, logit_offset=offset))
    for each in (data, adjusted):
        for candidate in mlp_candidates(mlp(epochs=4), each, folds, 0)(0.01):
            predicted = candidate.out_of_fold
            assert predicted.dtype == np.float32
            assert predicted.shape == (150, 3)
            used = predicted.astype(np.float64)
            if multi_label:
                if each is adjusted:
                    used = expit(np.log(used / (1 - used)) + offset)
                weighting = data.weighting
                both = np.stack([weighting.absent, weighting.present])
                wrong = [
                    log_loss(
                        y[50:, c],
                        used[:, c],
                        sample_weight=both[y[50:, c], c],
                        normalize=False,
                    )
                    for c in range(3)
                ]
                expected = sum(wrong) / 150
            else:
                np.testing.assert_allclose(used.sum(1), 1, rtol=1e-5)
                if each is adjusted:
                    used = softmax(np.log(used) + offset, axis=1)
                weights = data.weighting.present[y[50:]]
                right = used[np.arange(150), y[50:]]
                expected = -(weights * np.log(right)).mean()
            assert candidate.val_loss == pytest.approx(expected, rel=1e-4)


def test_a_held_out_tenth_is_judged_by_a_head_of_the_rest():
    x, y = blobs(400)
    folds = np.where(np.arange(400) % 10 == 0, 0, -1)
    last = list(mlp_candidates(mlp(), labelled(x, targets=y), folds, 0)(0.01))[-1]
    assert last.out_of_fold.shape == (40, 3)
    assert (last.out_of_fold.argmax(1) == y[folds == 0]).mean() > 0.7


def test_the_same_seed_gives_the_same_bits():
    x, y = blobs(700)
    folds = thirds(700)

    def run(seed):
        data = labelled(x, targets=y)
        return list(mlp_candidates(mlp(epochs=3), data, folds, seed)(0.01))

    for one, other in zip(run(0), run(0), strict=True):
        assert (one.loss, one.val_loss) == (other.loss, other.val_loss)
        assert np.array_equal(one.out_of_fold, other.out_of_fold)
        for a, b in zip(one.weights, other.weights, strict=True):
            assert np.array_equal(a, b)
    assert not np.allclose(run(0)[-1].weights[0], run(1)[-1].weights[0], atol=1e-3)


def test_strengths_do_not_affect_each_other():
    x, y = blobs(300)
    data = labelled(x, targets=y)
    candidates = mlp_candidates(mlp(epochs=3), data, thirds(300), 0)
    strong = candidates(1.0)
    next(strong)
    weak = list(candidates(1e-4))
    again = list(candidates(1e-4))
    assert [c.l2 for c in weak] == [1e-4] * 3
    for one, other in zip(weak, again, strict=True):
        assert np.array_equal(one.out_of_fold, other.out_of_fold)
    assert len(list(strong)) == 2


def test_l2_shrinks_the_kernels():
    x, y = blobs(300)
    data = labelled(x, targets=y)
    candidates = mlp_candidates(mlp(hidden=(8, 8), epochs=30), data, None, 0)
    norms = [
        [float((kernel**2).sum()) for kernel in next(candidates(l2)).weights[::2]]
        for l2 in (0.3, 1e-6)
    ]
    assert all(strong < 0.7 * weak for strong, weak in zip(*norms, strict=True))


def xor(count: int, seed: int):
    x = np.random.default_rng(seed).uniform(-1, 1, (count, 2)).astype(np.float32)
    x += 0.1 * np.sign(x)
    return x * 4 + 2, (x[:, 0] * x[:, 1] > 0).astype(np.int64)


XOR_MLP = mlp(hidden=(32,), dropout=0.0, learning_rate=0.1, epochs=16)


def test_an_mlp_learns_what_a_linear_head_cannot():
    (x, y), (test_x, test_y) = xor(600, 0), xor(200, 1)
    data = labelled(x, targets=y, num_classes=2)
    last = list(mlp_candidates(XOR_MLP, data, thirds(600), 0)(1e-4))[-1]
    assert (last.out_of_fold.argmax(1) == y).mean() > 0.95
    predicted = predict(XOR_MLP, last.weights, test_x, 2).argmax(1)
    assert (predicted == test_y).mean() > 0.95


def test_heads_learn_from_all_views_and_predict_the_first():
    x, y = xor(600, 0)
    # Each view shows one half of the plane; only both together tell the rule.
    right = np.where(x[:, :1] > 2, x, 4 - x)
    both = labelled(right, 4 - right, targets=y, num_classes=2)
    half = labelled(right, targets=y, num_classes=2)
    test_x, test_y = xor(200, 1)
    found = []
    for data in (both, half):
        last = list(mlp_candidates(XOR_MLP, data, thirds(600), 0)(1e-4))[-1]
        assert last.out_of_fold.shape == (600, 2)
        assert (last.out_of_fold.argmax(1) == y).mean() > 0.95
        predicted = predict(XOR_MLP, last.weights, test_x, 2).argmax(1)
        found.append((predicted == test_y).mean())
    assert found[0] > 0.95
    assert found[1] < 0.85


def test_dropout_hinders_fitting_by_heart():
    x, y = blobs(60)
    y = np.random.default_rng(1).permutation(y)
    losses = [
        next(mlp_candidates(mlp(dropout=p, epochs=30), data, None, 0)(0.0)).loss
        for data in [labelled(x, targets=y)]
        for p in (0.0, 0.3, 0.9, 0.999999)
    ]
    assert losses == sorted(losses)
    assert losses[0] < losses[2] - 0.1


def test_candidates_come_at_epochs_about_sqrt_2_apart():
    x, y = blobs(90)
    data = labelled(x, targets=y)
    for epochs in (1, 4, 5, 64, 70):
        config = mlp(hidden=(2,), epochs=epochs)
        found = [c.epoch for c in mlp_candidates(config, data, thirds(90), 0)(1.0)]
        assert found == [e for e in CHECKPOINTS if e < epochs] + [epochs]


@pytest.mark.parametrize("patience", [1, 10])
def test_they_end_when_the_out_of_fold_loss_no_longer_improves(patience):
    x, y = blobs(120)
    y = np.random.default_rng(1).permutation(y)  # nothing to learn
    config = mlp(epochs=300, patience=patience)
    found = list(mlp_candidates(config, labelled(x, targets=y), thirds(120), 0)(0.0))
    assert [c.epoch for c in found] == CHECKPOINTS[: len(found)]
    best, best_epoch = np.inf, 0
    for candidate, following in itertools.zip_longest(found, found[1:]):
        if candidate.val_loss < best - MIN_DELTA:
            best, best_epoch = candidate.val_loss, candidate.epoch
        stopped = candidate.epoch - best_epoch >= patience
        assert stopped == (following is None)


def test_without_folds_there_is_one_candidate():
    x, y = blobs(90)
    for epochs in (1, 7, 300):
        config = mlp(epochs=epochs, learning_rate=0.003)
        (only,) = mlp_candidates(config, labelled(x, targets=y), None, 0)(0.01)
        assert only.epoch == min(epochs, 30)


def test_many_features_are_reduced_to_where_they_vary():
    rng = np.random.default_rng(0)
    x, y = blobs(500, features=100)
    directions = np.linalg.qr(rng.normal(size=(400, 400)))[0]
    noise = rng.normal(size=(500, 300)) * 1e-3
    wide = np.concatenate([x - 5, noise], axis=1) @ directions.T
    data = labelled(wide.astype(np.float32) + 3, targets=y)
    last = list(mlp_candidates(mlp(epochs=6), data, thirds(500), 0)(0.01))[-1]
    kernel = directions.T @ last.weights[0]
    assert last.weights[0].shape == (400, 16)
    # Every direction of the large variance is among the components.
    assert np.linalg.matrix_rank(kernel[:100] @ kernel[:100].T, tol=1e-9) == 16
    assert (last.out_of_fold.argmax(1) == y).mean() > 0.9
    predicted = predict(mlp(), last.weights, data.views[0])
    assert (predicted.argmax(1) == y).mean() > 0.9


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_features_on_disk_give_the_same_heads(tmp_path, dtype):
    x, y = blobs(300)
    views = [x.astype(np.float16).astype(np.float32) + view for view in range(2)]
    tables = []
    for number, view in enumerate(views):
        spec = FeatureSpec("base", "", 1, "", dtype, 1, number)
        table = FeatureCache(tmp_path).table(spec)
        for i, row in enumerate(view):
            table.add(b"%032d" % i, row)
        table.flush()
        tables.append(table.features([b"%032d" % i for i in range(300)]))
    config = mlp(epochs=4, dropout=0.0)
    in_memory = labelled(*views, targets=y)
    on_disk = replace(in_memory, views=tables, chunk_rows=37)
    one, other = (
        list(mlp_candidates(config, data, thirds(300), 0)(0.01))[-1]
        for data in (in_memory, on_disk)
    )
    np.testing.assert_allclose(one.out_of_fold, other.out_of_fold, atol=1e-3)
    assert one.val_loss == pytest.approx(other.val_loss, abs=1e-4)


def test_features_that_do_not_vary_predict_the_frequencies():
    y = np.arange(90) % 3 % 2
    data = labelled(np.full((90, 4), 7, np.float32), targets=y, num_classes=2)
    config = mlp(epochs=64, learning_rate=0.1)
    last = list(mlp_candidates(config, data, thirds(90), 0)(0.0))[-1]
    np.testing.assert_allclose(last.out_of_fold, [[2 / 3, 1 / 3]] * 90, atol=0.1)


def test_folds_must_leave_something_to_learn_from():
    x, y = blobs(30)
    with pytest.raises(UsageError, match=r"leave images to learn from\. Received: all"):
        mlp_candidates(mlp(), labelled(x, targets=y), np.zeros(30, np.int64), 0)
