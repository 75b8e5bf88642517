"""The objective of infopro."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from heads import IMAGES, LABELS, MAPS, VECTORS, run, site

from jdecouple.methods import objectives
from jdecouple.methods.objectives import (
    InformationPropagation,
    PredictionSimilarity,
    cross_entropy,
)
from jdecouple.models.resampling import bilinear
from jdecouple.train import loop as training


def test_weights_run_from_the_first_to_the_last_local_module():
    objective = InformationPropagation((5, 0.5), (0, 1))
    found = [objective.weights(index, 6) for index in range(5)]
    expected = [(5, 0), (3.875, 0.25), (2.75, 0.5), (1.625, 0.75), (0.5, 1)]
    np.testing.assert_allclose(found, expected)
    assert objective.weights(0, 2) == (5, 0)


@pytest.mark.parametrize(
    "task_loss", [pytest.param("contrastive", marks=pytest.mark.slow), "cross_entropy"]
)
def test_infopro_by_its_definition(task_loss, x64):
    objective = InformationPropagation((2, 1), (0.5, 3), task_loss, temperature=0.3)
    maps, images = MAPS.astype(jnp.float64), IMAGES.astype(jnp.float64)
    head = objective.head(site(maps, image=images, index=2), nnx.Rngs(0))
    output, _, _ = run(head, maps, image=images)
    first, norm, _, second = head.decoder.net.layers
    hidden = nnx.relu(norm(first(bilinear(maps, 9, 9))))
    assert hidden.shape == (8, 9, 9, 12)
    p = np.asarray(nnx.sigmoid(second(hidden)))
    image = np.asarray(objectives.unit_range(images))
    bce = -np.mean(image * np.log(p) + (1 - image) * np.log(1 - p))
    conv, norm, _, _, dense = head.task_net.layers
    reduced = nnx.relu(norm(conv(maps)))
    assert reduced.shape == (8, 3, 3, 6)
    z = dense(reduced.mean((1, 2)))
    if task_loss == "contrastive":
        assert z.shape == (8, 128)
        task = objectives.supervised_contrastive(z, LABELS, 0.3)
        assert output.logits is None
    else:
        task = cross_entropy(z, LABELS)
        np.testing.assert_allclose(output.logits, z, atol=1e-12)
    assert float(output.metrics["reconstruction"]) == pytest.approx(bce, abs=1e-10)
    assert float(output.metrics[task_loss]) == pytest.approx(float(task), abs=1e-10)
    assert float(output.loss) == pytest.approx(bce + 3 * float(task), abs=1e-10)


@pytest.mark.slow
def test_the_image_starts_at_the_first_block_where_one_above_reads_it():
    objective = InformationPropagation((1, 1), (1, 1), image_mean=(0.5, 0.2), image_std=(0.3, 0.4))
    output, _, _ = run(objective.head(site(index=0), nnx.Rngs(0)))
    assert output.carry.keys() == {"image"}
    expected = np.clip(np.asarray(IMAGES) * (0.3, 0.4) + (0.5, 0.2), 0, 1)
    np.testing.assert_allclose(output.carry["image"], expected, atol=1e-6)
    for where in (site(index=1), site(index=0, num_blocks=2)):
        assert not run(objective.head(where, nnx.Rngs(0)))[0].carry
    for reconstruction in ((0, 0), (1, 0)):  # linear: of three blocks only the first reads it
        quiet = InformationPropagation(reconstruction, (1, 1))
        assert not run(quiet.head(site(index=0, num_blocks=3), nnx.Rngs(0)))[0].carry


def test_a_term_of_weight_zero_is_left_out():
    for index, names in ((0, {"reconstruction"}), (2, {"contrastive"})):
        head = InformationPropagation().head(site(index=index), nnx.Rngs(0))
        assert run(head)[0].metrics.keys() == names


@pytest.mark.parametrize(
    ("most", "channels", "strides"), [(0, 6, 2), (4, 6, 2), (3, 3, 1), (2, 3, 1)]
)
def test_maps_of_many_channels_keep_them_in_the_task_net(most, channels, strides):
    head = InformationPropagation(max_channels=most).head(site(index=2), nnx.Rngs(0))
    convolution, norm, _, _, dense = head.task_net.layers
    assert convolution.out_features == norm.num_features == dense.layers[1].in_features == channels
    assert convolution(MAPS).shape == (8, 6 // strides, 6 // strides, channels)


@pytest.mark.parametrize(
    "objective", [InformationPropagation((1, 1), (1, 1)), PredictionSimilarity()]
)
def test_all_layers_of_a_head_start_as_the_method_says(objective):
    for features in (MAPS, VECTORS):
        head = objective.head(site(features, init="torch"), nnx.Rngs(0))
        nodes = [node for _, node in nnx.iter_graph(head)]
        for layer in (node for node in nodes if isinstance(node, nnx.Conv | nnx.Linear)):
            kernel = layer.kernel[...]
            assert np.abs(kernel).max() <= (kernel.size / kernel.shape[-1]) ** -0.5
            assert layer.bias is None or layer.bias[...].any()


def test_unit_range():
    bytes_ = np.array([[[[0], [51]], [[102], [255]]]], np.uint8)
    np.testing.assert_allclose(objectives.unit_range(jnp.asarray(bytes_)), bytes_ / 255, atol=1e-7)
    pixels = jax.random.uniform(jax.random.key(0), (3, 4, 4, 2))
    mean, std = jnp.array([0.4, 0.6]), jnp.array([0.2, 0.3])
    back = objectives.unit_range((pixels - mean) / std, (0.4, 0.6), (0.2, 0.3))
    np.testing.assert_allclose(back, pixels, atol=1e-6)
    rescaled = objectives.unit_range((3 * pixels - 7).at[1].set(4.0))
    assert float(rescaled[0].min()) == float(rescaled[2].min()) == 0
    assert float(rescaled[0].max()) == float(rescaled[2].max()) == 1
    np.testing.assert_array_equal(rescaled[1], jnp.full((4, 4, 2), 0.5))
    assert objectives.unit_range(pixels.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.slow
def test_a_run_knows_how_its_images_were_normalised():
    config = {"method": {"name": "infopro"}, "model": {"name": "mlp", "hidden": 8, "depth": 2}}
    config |= {"data": {"name": "synthetic", "image_size": 4, "synthetic_size": 40}}
    run_ = training.build({**config, "batch_size": 8})
    objective = run_.trainer.method.objective
    assert objective.image_mean == pytest.approx(run_.dataset.mean)
    assert objective.image_std == pytest.approx(run_.dataset.std)
    config["method"] |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "task": [1, 0]}
    objective = training.build({**config, "batch_size": 8}).trainer.method.objective
    assert objective.image_mean == (0.5,) * 3
    assert objective.task == (1.0, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: InformationPropagation((1,)),
            r"is \(1,\): two weights",
        ),
        (lambda: InformationPropagation(task=1.0), "task is 1.0: a sequence of numbers"),
        (
            lambda: InformationPropagation((1, -1)),
            "reconstruction is -1: a finite number of at least 0",
        ),
        (
            lambda: InformationPropagation(task_loss="ce"),
            "task_loss is 'ce': allowed are contrastive, cross_entropy",
        ),
        (
            lambda: InformationPropagation(count_self="no"),
            "count_self is 'no': True or False is needed",
        ),
        (
            lambda: InformationPropagation(max_channels=-1),
            "max_channels is -1: a whole number of at least 0",
        ),
        (lambda: InformationPropagation(hidden=0), "hidden is 0: a whole number of at least 1"),
        (
            lambda: InformationPropagation(temperature=0),
            "temperature is 0: a finite number above 0",
        ),
        (lambda: InformationPropagation(image_mean=(0.5,)), "as many numbers of each"),
        (
            lambda: InformationPropagation(image_mean=(0.5,), image_std=(0.0,)),
            "image_std above 0",
        ),
        (
            lambda: InformationPropagation(image_mean=(0.5,), image_std=(1.0,)).head(
                site(), nnx.Rngs(0)
            ),
            "image_mean has 1 numbers: the images have 2 channels",
        ),
        (
            lambda: InformationPropagation((0, 0), (0, 1)).head(site(index=0), nnx.Rngs(0)),
            "a weight above 0 is needed at block 0",
        ),
        (
            lambda: InformationPropagation().head(
                site(image=jnp.zeros((8, 4), jnp.int32)), nnx.Rngs(0)
            ),
            r"input is int32\[8, 4\]: infopro needs images",
        ),
    ],
)
def test_bad_arguments_get_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
