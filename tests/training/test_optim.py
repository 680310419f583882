"""Layer-wise learning rates, against plain AdamW with each of the rates."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_transfer.training.optim import (
    LayerwiseAdamW,
    group_multipliers,
    layer_patterns,
    match_once,
    warmup_cosine,
)

RATES = {"low": 0.01, "middle": 0.3, "top": 1.0}
MULTIPLIERS = [(f"{name}/", rate) for name, rate in RATES.items()]
DECAY = 0.5
RATE = 3e-3


def network(seed: int = 0, dtype: str = "float64") -> keras.Model:
    """Three layers, one a multiplier."""
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((5,), dtype=dtype)
    for name in RATES:
        x = keras.layers.Dense(
            4, "tanh", dtype=dtype, bias_initializer="ones", name=name
        )(x)
    return keras.Model(inputs, x)


def layer_of(variable: keras.Variable) -> str:
    return variable.path.split("/")[-2]


def gradients(steps: int, model: keras.Model) -> list[list[tf.Tensor]]:
    """Of sizes from 0.01 to 100, so that a step does not depend on the last only."""
    rng = np.random.default_rng(1)
    return [
        [
            tf.constant(rng.normal(size=v.shape) * 10 ** rng.uniform(-2, 2), v.dtype)
            for v in model.trainable_variables
        ]
        for _ in range(steps)
    ]


def values(model: keras.Model) -> list[np.ndarray]:
    return [variable.numpy() for variable in model.trainable_variables]


def plain_adamw(model: keras.Model, learning_rate: float, **options):
    """For each layer an AdamW of its own, and the variables it trains."""
    return [
        (
            keras.optimizers.AdamW(learning_rate * rate, **options),
            [i for i, v in enumerate(model.trainable_variables) if layer_of(v) == name],
        )
        for name, rate in RATES.items()
    ]


def apply_plain(optimizers, model: keras.Model, step: list[tf.Tensor]) -> None:
    variables = model.trainable_variables
    for optimizer, indices in optimizers:
        optimizer.apply([step[i] for i in indices], [variables[i] for i in indices])


def assert_same_updates(one, other, start, rtol=1e-6) -> None:
    """Both went the same way from the start, to the precision of the rates."""
    for new, expected, old in zip(one, other, start, strict=True):
        assert (expected != old).all()
        largest = np.abs(expected - old).max()
        np.testing.assert_allclose(new - old, expected - old, rtol, rtol * largest)


OPTIONS = [
    {"weight_decay": 0.0},
    {"weight_decay": DECAY},
    {"weight_decay": DECAY, "clipvalue": 0.5},
    {"weight_decay": DECAY, "clipnorm": 1.0},
    {"weight_decay": DECAY, "amsgrad": True, "beta_1": 0.5, "epsilon": 1e-3},
    {"weight_decay": DECAY, "gradient_accumulation_steps": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_variable_is_trained_as_by_an_adamw_of_its_own(options):
    model, expected = network(), network()
    start = values(model)
    optimizer = LayerwiseAdamW(RATE, MULTIPLIERS, **options)
    plain = plain_adamw(expected, RATE, **options)
    for step in gradients(6, model):
        optimizer.apply(step, model.trainable_variables)
        apply_plain(plain, expected, step)
    assert_same_updates(values(model), values(expected), start)


def test_weight_decay_and_clipping_do_change_the_steps():
    ends = []
    for options in OPTIONS:
        model = network()
        optimizer = LayerwiseAdamW(RATE, MULTIPLIERS, **options)
        for step in gradients(6, model):
            optimizer.apply(step, model.trainable_variables)
        ends.append(values(model)[0])
    for i, one in enumerate(ends):
        for other in ends[:i]:
            assert np.abs(one - other).max() > 1e-6


def test_the_global_norm_is_that_of_all_gradients():
    model, expected = network(), network()
    start = values(model)
    optimizer = LayerwiseAdamW(RATE, MULTIPLIERS, global_clipnorm=1.0)
    plain = plain_adamw(expected, RATE)
    for step in gradients(6, model):
        norm = math.sqrt(sum(float(tf.reduce_sum(g**2)) for g in step))
        assert norm > 1
        optimizer.apply(step, model.trainable_variables)
        apply_plain(plain, expected, [g / norm for g in step])
    assert_same_updates(values(model), values(expected), start)


def regression(model: keras.Model, rows: int = 24):
    rng = np.random.default_rng(2)
    dtype = model.trainable_variables[0].dtype
    return rng.normal(size=(rows, 5)).astype(dtype), rng.normal(size=(rows, 4))


def fit(model: keras.Model, optimizer=None, epochs: int = 1, **options):
    if optimizer is not None:
        model.compile(optimizer, "mse", jit_compile=False)
    return model.fit(
        *regression(model),
        batch_size=8,
        shuffle=False,
        epochs=epochs,
        verbose=0,
        **options,
    )


@pytest.mark.parametrize("weight_decay", [0.0, DECAY])
def test_fit_trains_as_an_adamw_for_each_layer_would(weight_decay):
    model, expected = network(), network()
    start = values(model)
    fit(model, LayerwiseAdamW(RATE, MULTIPLIERS, weight_decay=weight_decay), epochs=2)
    plain = plain_adamw(expected, RATE, weight_decay=weight_decay)
    x, y = regression(expected)
    for rows in [slice(i, i + 8) for i in (0, 8, 16)] * 2:
        with tf.GradientTape() as tape:
            loss = keras.losses.MeanSquaredError()(y[rows], expected(x[rows]))
        apply_plain(plain, expected, tape.gradient(loss, expected.trainable_variables))
    assert_same_updates(values(model), values(expected), start, rtol=1e-4)


def test_without_multipliers_it_is_adamw():
    model, expected = network(), network()
    plain = keras.optimizers.AdamW(RATE, weight_decay=DECAY)
    optimizer = LayerwiseAdamW(RATE, weight_decay=DECAY)
    start = values(model)
    for step in gradients(4, model):
        optimizer.apply(step, model.trainable_variables)
        plain.apply(step, expected.trainable_variables)
    assert_same_updates(values(model), values(expected), start, rtol=1e-9)


def test_only_the_given_order_of_variables_counts_when_building():
    model, expected = network(), network()
    start = values(model)
    one, other = (LayerwiseAdamW(RATE, MULTIPLIERS) for _ in range(2))
    one.build(model.trainable_variables[::-1])
    for step in gradients(3, model):
        one.apply(step, model.trainable_variables)
        other.apply(step, expected.trainable_variables)
    assert_same_updates(values(model), values(expected), start, rtol=1e-9)


def step_sizes(optimizer, model: keras.Model) -> dict[str, float]:
    """How far each layer goes: with a constant gradient Adam's step is the rate."""
    before = values(model)
    step = [100 * tf.ones(v.shape, v.dtype) for v in model.trainable_variables]
    optimizer.apply(step, model.trainable_variables)
    sizes = {}
    for variable, old in zip(model.trainable_variables, before, strict=True):
        size = old - variable.numpy()
        np.testing.assert_allclose(size, size.flat[0], rtol=1e-5)
        sizes[layer_of(variable)] = float(size.flat[0])
    return sizes


def scaled_rates(learning_rate: float):
    return pytest.approx(
        {name: learning_rate * rate for name, rate in RATES.items()}, rel=1e-5
    )


def test_the_learning_rate_reads_and_sets_as_of_every_optimizer():
    model = network()
    optimizer = LayerwiseAdamW(0.01, MULTIPLIERS, weight_decay=0.0)
    assert float(optimizer.learning_rate) == pytest.approx(0.01)
    assert step_sizes(optimizer, model) == scaled_rates(0.01)
    optimizer.learning_rate = 0.002
    assert float(optimizer.learning_rate) == pytest.approx(0.002)
    assert step_sizes(optimizer, model) == scaled_rates(0.002)
    optimizer.learning_rate.assign(0.5)
    assert step_sizes(optimizer, model) == scaled_rates(0.5)


def test_a_schedule_is_followed_by_every_layer():
    model = network()
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [1, 3], [0.1, 1.0, 5.0]
    )
    optimizer = LayerwiseAdamW(schedule, MULTIPLIERS, weight_decay=0.0)
    for rate in (0.1, 0.1, 1.0, 1.0, 5.0):
        assert float(optimizer.learning_rate) == pytest.approx(rate)
        assert step_sizes(optimizer, model) == scaled_rates(rate)
    with pytest.raises(TypeError):
        optimizer.learning_rate = 0.1


def test_weight_decay_follows_the_schedule_and_the_multiplier():
    model = network()
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0], [0.1, 0.01])
    optimizer = LayerwiseAdamW(schedule, MULTIPLIERS, weight_decay=DECAY)
    for rate in (0.1, 0.01):
        start = values(model)
        step = [tf.zeros(v.shape, v.dtype) for v in model.trainable_variables]
        optimizer.apply(step, model.trainable_variables)
        for variable, old in zip(model.trainable_variables, start, strict=True):
            left = 1 - rate * RATES[layer_of(variable)] * DECAY
            np.testing.assert_allclose(variable.numpy() / old, left, rtol=1e-8)


class Rates(keras.callbacks.Callback):
    """Reads the learning rate after every epoch."""

    def __init__(self):
        super().__init__()
        self.rates: list[float] = []

    def on_epoch_end(self, epoch, logs=None):
        self.rates.append(float(self.model.optimizer.learning_rate))


def test_callbacks_set_the_learning_rate():
    model = network()
    seen = Rates()
    by_epoch = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    optimizer = LayerwiseAdamW(0.8, MULTIPLIERS, weight_decay=0.0)
    log = fit(model, optimizer, epochs=3, callbacks=[by_epoch, seen])
    assert seen.rates == pytest.approx([0.4, 0.2, 0.1])
    assert log.history["learning_rate"] == pytest.approx([0.4, 0.2, 0.1])

    model, seen = network(), Rates()
    plateau = keras.callbacks.ReduceLROnPlateau("loss", 0.1, patience=1, min_delta=99)
    optimizer = LayerwiseAdamW(0.8, MULTIPLIERS, weight_decay=0.0)
    fit(model, optimizer, epochs=4, callbacks=[plateau, seen])
    assert seen.rates == pytest.approx([0.8, 0.08, 0.008, 0.0008], rel=1e-4)


def test_a_rate_set_by_a_callback_is_multiplied():
    model, expected = network(), network()
    start = values(model)
    callback = keras.callbacks.LearningRateScheduler(lambda epoch: RATE)
    fit(model, LayerwiseAdamW(99.0, MULTIPLIERS), callbacks=[callback])
    fit(expected, LayerwiseAdamW(RATE, MULTIPLIERS))
    assert_same_updates(values(model), values(expected), start)


def test_tensorboard_logs_the_learning_rate(tmp_path):
    pytest.importorskip("tensorboard")
    callback = keras.callbacks.TensorBoard(tmp_path)
    fit(network(), LayerwiseAdamW(RATE, MULTIPLIERS), callbacks=[callback])
    (events,) = (tmp_path / "train").glob("events*")
    found = {
        value.tag: tf.make_ndarray(value.tensor).item()
        for event in tf.compat.v1.train.summary_iterator(str(events))
        for value in event.summary.value
        if value.tag == "epoch_learning_rate"
    }
    assert found == {"epoch_learning_rate": pytest.approx(RATE)}


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "loss scaling"])
@pytest.mark.parametrize("schedule", [False, True], ids=["number", "schedule"])
def test_a_reloaded_model_goes_on_with_the_same_bits(tmp_path, schedule, scaled):
    model = network(dtype="float32")
    rate = warmup_cosine(RATE, 20, 0.2) if schedule else RATE
    optimizer = LayerwiseAdamW(rate, MULTIPLIERS, weight_decay=DECAY)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(
            optimizer, dynamic_growth_steps=4
        )
    fit(model, optimizer)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer is not model.optimizer

    def state(of: keras.Model) -> list[bytes]:
        return [v.numpy().tobytes() for v in of.variables + of.optimizer.variables]

    saved = state(model)
    assert state(loaded) == saved
    inner = loaded.optimizer.inner_optimizer if scaled else loaded.optimizer
    assert type(inner) is LayerwiseAdamW
    assert inner.get_config()["lr_multipliers"] == MULTIPLIERS
    fit(model)
    fit(loaded)
    assert state(loaded) == state(model) != saved


def test_a_copy_made_of_its_config_is_the_same():
    optimizer = LayerwiseAdamW(0.02, MULTIPLIERS, weight_decay=0.3, beta_2=0.9)
    config = optimizer.get_config()
    copy = LayerwiseAdamW.from_config(config)
    assert copy.get_config() == config
    assert (copy.weight_decay, copy.beta_2) == (0.3, 0.9)
    serialized = keras.optimizers.serialize(optimizer)
    assert serialized["registered_name"] == "keras_transfer>LayerwiseAdamW"
    assert keras.optimizers.deserialize(serialized).get_config() == config


@pytest.mark.parametrize("by", ["variable", "name"])
def test_excluded_variables_do_not_decay(by):
    model = network()
    variables = model.trainable_variables
    biases = [v for v in variables if v.name == "bias"]
    optimizer = LayerwiseAdamW(0.1, MULTIPLIERS, weight_decay=DECAY)
    if by == "variable":
        optimizer.exclude_from_weight_decay(var_list=biases)
    else:
        optimizer.exclude_from_weight_decay(var_names=["bias"])
    start = values(model)
    optimizer.apply([tf.zeros(v.shape, v.dtype) for v in variables], variables)
    for variable, old in zip(variables, start, strict=True):
        left = 1 - 0.1 * RATES[layer_of(variable)] * DECAY
        expected = old if variable.name == "bias" else old * left
        np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-8)
        assert np.array_equal(variable.numpy(), old) == (variable.name == "bias")


def test_scaled_losses_give_the_same_steps():
    model, expected = network(), network()
    start = values(model)
    optimizer = LayerwiseAdamW(RATE, MULTIPLIERS, weight_decay=DECAY)
    fit(model, keras.optimizers.LossScaleOptimizer(optimizer, 1024.0), epochs=2)
    fit(expected, LayerwiseAdamW(RATE, MULTIPLIERS, weight_decay=DECAY), epochs=2)
    assert_same_updates(values(model), values(expected), start, rtol=1e-4)


def test_a_step_with_infinite_gradients_is_left_out():
    model = network()
    variables = model.trainable_variables
    inner = LayerwiseAdamW(0.01, MULTIPLIERS, weight_decay=0.0)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, 4.0)
    assert step_sizes(optimizer, model) == scaled_rates(0.01)
    start = values(model)
    optimizer.apply([tf.fill(v.shape, tf.cast(math.inf, v.dtype)) for v in variables])
    for old, new in zip(start, values(model), strict=True):
        assert np.array_equal(old, new)
    assert float(optimizer.dynamic_scale) == 2.0
    assert int(optimizer.iterations) == 1


@pytest.mark.parametrize(
    ("multipliers", "named"),
    [
        ([("low/", 1.0), ("top/", 1.0)], "middle/kernel"),
        ([("iddle/", 1.0), ("low/", 1.0), ("top/", 1.0)], "middle/kernel"),
        ([*MULTIPLIERS, ("middle/b", 1.0)], "middle/bias"),
        ([*MULTIPLIERS, (".*kernel", 0.5)], "low/kernel"),
        ([], "low/kernel"),
        ([*MULTIPLIERS, ("side/", 0.5)], "side/"),
        ([*MULTIPLIERS, ("low/kernels", 0.5)], "low/kernels"),
    ],
    ids=["missing", "inside", "twice", "all twice", "none", "unused", "too long"],
)
def test_patterns_that_do_not_match_once_are_refused(multipliers, named):
    model = network()
    optimizer = LayerwiseAdamW(RATE, multipliers)
    with pytest.raises(ValueError, match="lr_multipliers") as caught:
        optimizer.build(model.trainable_variables)
    assert repr(named) in str(caught.value)
    assert not optimizer.built
    with pytest.raises(ValueError, match="lr_multipliers"):
        fit(model, LayerwiseAdamW(RATE, multipliers))


def test_each_path_gets_the_multiplier_of_its_one_pattern():
    paths = ["a/kernel", "b/kernel", "a/bias"]
    assert match_once(paths, [("b", 2), ("a/", 3.5)]) == [3.5, 2, 3.5]
    assert match_once(paths, [("", 0.1)]) == [0.1] * 3
    assert match_once(paths, [("[ab]/k", 1), (".*bias$", 2)]) == [1, 1, 2]
    assert match_once([], []) == []


def test_the_patterns_that_match_are_named():
    with pytest.raises(ValueError) as caught:
        match_once(["a/kernel"], [("a", 1), ("c", 1), ("a/k", 1)])
    assert "'a/kernel', matched by ['a', 'a/k']" in str(caught.value)
    with pytest.raises(ValueError, match=r"\['c', 'd'\], which match none of 1"):
        match_once(["a/kernel"], [("c", 1), ("a", 1), ("d", 1)])


@pytest.mark.parametrize(
    ("groups", "decay", "base_rate", "expected"),
    [
        (["stem", "one", "two", "head"], 0.3, None, [0.027, 0.09, 0.3, 1]),
        (["stem", "one", "two", "head"], 0.5, 0.1, [0.025, 0.05, 0.1, 1]),
        (["one", "two", "head"], 1.0, 0.02, [0.02, 0.02, 1]),
        (["one", "two", "head"], 1.0, None, [1, 1, 1]),
        (["head"], 0.3, 0.1, [1]),
    ],
)
def test_rates_fall_from_the_head_down(groups, decay, base_rate, expected):
    multipliers = group_multipliers(groups, decay, base_rate)
    assert list(multipliers) == groups
    assert list(multipliers.values()) == pytest.approx(expected)


def test_layers_are_matched_by_their_whole_names():
    groups = {"stem": ["conv1", "a.b"], "stage_1": [], "head": ["conv", "conv11", "b"]}
    patterns = layer_patterns(groups, {"stem": 0.1, "stage_1": 0.5, "head": 1.0})
    assert [multiplier for _, multiplier in patterns] == [0.1, 1.0]
    names = ["conv", "conv1", "conv11", "a.b", "b"]
    paths = [f"{name}/kernel" for name in names]
    assert match_once(paths, patterns) == [1.0, 0.1, 1.0, 0.1, 1.0]
    for stranger in ("axb/kernel", "conv12/kernel", "aconv/kernel", "conv"):
        with pytest.raises(ValueError, match=repr(stranger)):
            match_once([*paths, stranger], patterns)


def test_patterns_of_layers_fit_a_real_model():
    model = network()
    names = {layer.name: [layer.name] for layer in model.layers[1:]}
    optimizer = LayerwiseAdamW(0.1, layer_patterns(names, RATES), weight_decay=0.0)
    optimizer.build(model.trainable_variables)
    assert step_sizes(optimizer, model) == scaled_rates(0.1)


@pytest.mark.parametrize(
    ("steps", "warmup", "up"), [(100, 0.1, 10), (40, 0.5, 20), (7, 0.2, 1)]
)
def test_rates_rise_to_the_highest_and_fall_to_nothing(steps, warmup, up):
    schedule = warmup_cosine(0.2, steps, warmup)
    rates = [float(schedule(step)) for step in range(steps + 1)]
    assert rates[0] == 0
    assert rates[up] == pytest.approx(0.2)
    assert rates[steps] == pytest.approx(0, abs=1e-8)
    np.testing.assert_allclose(np.diff(rates[: up + 1]), 0.2 / up, rtol=1e-4)
    assert (np.diff(rates[up:]) < 0).all()
    down = np.arange(steps + 1 - up) / (steps - up)
    expected = 0.1 * (1 + np.cos(np.pi * down))
    np.testing.assert_allclose(rates[up:], expected, atol=1e-7)


@pytest.mark.parametrize(("steps", "warmup"), [(50, 0.0), (3, 0.1)])
def test_without_warm_up_rates_only_fall(steps, warmup):
    schedule = warmup_cosine(0.2, steps, warmup)
    rates = [float(schedule(step)) for step in range(steps + 1)]
    expected = 0.1 * (1 + np.cos(np.pi * np.arange(steps + 1) / steps))
    np.testing.assert_allclose(rates, expected, atol=1e-7)


def test_a_warm_up_of_all_steps_ends_at_the_highest_rate():
    schedule = warmup_cosine(0.2, 10, 1.0)
    rates = [float(schedule(step)) for step in range(11)]
    np.testing.assert_allclose(rates, np.linspace(0, 0.2, 11), rtol=1e-5)
