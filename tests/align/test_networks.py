"""The networks' layers, compiled and in torch, against their definition in float64."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import functional

from stages.align.area import crops
from stages.align.networks import SIDES, Layer, Level, Networks, layers
from stages.align.networks_compiled import CompiledLayer
from tests.align.scenes import scenes


def defined(layer: Layer, maps: NDArray[np.floating]) -> NDArray[np.float64]:
    """A layer in float64, by torch's own functions."""
    kernel, bias = (torch.from_numpy(part).double() for part in (layer.kernel, layer.bias))
    out = functional.conv2d(torch.from_numpy(maps).double().permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1), bias)
    if layer.slope is not None:
        out = functional.prelu(out, torch.from_numpy(layer.slope).double())
    if layer.pool:
        out = functional.max_pool2d(out, layer.pool, stride=2, ceil_mode=True)
    return out.permute(0, 2, 3, 1).numpy()


@pytest.mark.usefixtures("compiled")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 3),
    height=st.integers(4, 21),
    width=st.integers(4, 21),
    kernel=st.integers(1, 3),
    inputs=st.integers(1, 40),
    channels=st.integers(1, 50),
    pool=st.sampled_from([0, 2, 3]),
    active=st.booleans(),
)
def test_a_compiled_layer_is_a_convolution_with_prelu_and_max_pooling(
    count: int, height: int, width: int, kernel: int, inputs: int, channels: int, pool: int, active: bool
) -> None:
    """Of any shape, by the definition and by minimal filtering (kernels of 3, from 16 inputs on)."""
    rng = np.random.default_rng(height * width)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, np.float32)

    slope = normal(channels) if active else None
    layer = Layer(normal(kernel, kernel, inputs, channels), normal(channels), slope, pool)
    maps = normal(count, height, width, inputs)
    expected = defined(layer, maps)
    scale = np.sqrt(kernel * kernel * inputs) * (1 if slope is None else max(1, abs(slope).max()))
    made = CompiledLayer(layer)(maps)
    assert made.shape == expected.shape
    np.testing.assert_allclose(made, expected, atol=5e-6 * scale, rtol=0)
    for i in range(count):
        assert CompiledLayer(layer)(maps[i : i + 1]).tobytes() == made[i].tobytes()


@pytest.mark.usefixtures("compiled")
def test_a_dense_layer_sees_all_of_a_map() -> None:
    """A convolution whose kernel is as large as the map."""
    rng = np.random.default_rng(0)
    layer = Layer(rng.standard_normal((3, 3, 64, 20), np.float32), np.zeros(20, np.float32), None, 0)
    maps = rng.standard_normal((7, 3, 3, 64), np.float32)
    made = CompiledLayer(layer)(maps)
    assert made.shape == (7, 1, 1, 20)
    np.testing.assert_allclose(made, defined(layer, maps), atol=1e-4)
    assert CompiledLayer(layer)(maps[4:5]).tobytes() == made[4].tobytes()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    "maps",
    [
        np.zeros((1, 9, 9, 4), np.float32),
        np.zeros((1, 9, 9, 3)),
        np.zeros((1, 2, 9, 3), np.float32),
        np.zeros((1, 3, 9, 9), np.float32).transpose(0, 2, 3, 1),
    ],
    ids=["channels", "float64", "too small", "not in one piece"],
)
def test_maps_that_do_not_fit_are_refused(maps: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match="maps"):
        CompiledLayer(layers("rnet")[0])(maps)


def noise(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def said(name: str, maps: NDArray[np.floating]) -> NDArray[np.float64]:
    """A network in float64."""
    for layer in layers(name):
        maps = defined(layer, maps)
    return maps.astype(np.float64)


@pytest.mark.parametrize("name", SIDES)
def test_candidates_are_judged_as_in_float64_whatever_is_beside_them(name: str, networks: Networks) -> None:
    """By the trained weights, on noise; whatever is beside it, to the bit."""
    images = [noise(60, 90, 1), noise(100, 50, 2)]
    rng = np.random.default_rng(0)
    corners = rng.integers(-20, 50, (90, 2))
    boxes = np.hstack([corners, corners + rng.integers(10, 100, (90, 1))])
    owners = rng.integers(0, 2, 90)
    outputs = networks.look(name, images, owners, boxes)
    seen = crops(images, owners, boxes, SIDES[name], SIDES[name], rounded=False)
    np.testing.assert_allclose(outputs, said(name, seen)[:, 0, 0], atol=2e-5)
    for i in (0, 33, 89):
        assert networks.look(name, images, owners[i : i + 1], boxes[i : i + 1]).tobytes() == outputs[i].tobytes()
    assert networks.look(name, images, owners[:0], boxes[:0]).shape == (0, outputs.shape[1])


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(12, 90), st.integers(12, 90)), min_size=1, max_size=6),
    alike=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=4),
    threads=st.sampled_from([1, 2]),
)
def test_pyramids_are_looked_at_as_in_float64_whatever_is_beside_them(
    sizes: list[tuple[int, int]], alike: list[tuple[int, int]], threads: int, networks: Networks
) -> None:
    """P-Net on photographs of all sizes and of the same or nearly the same: the latter share a canvas in torch."""
    torch.set_num_threads(threads)
    sizes = sizes + sizes[:1] + [(sizes[0][0] + more, sizes[0][1] + wider) for more, wider in alike]
    images = [noise(height, width, i) for i, (height, width) in enumerate(sizes)]
    levels = [Level(i, *size) for i, size in enumerate(sizes)]
    everything = 1e-30
    cells = networks.cells(images, levels, everything)
    assert (np.bincount(cells.level, minlength=len(sizes)) > 0).all()
    for i, image in enumerate(images):
        own = cells.level == i
        alone = networks.cells([image], [Level(0, *image.shape[:2])], everything)
        for part, whole in (("places", cells.places), ("scores", cells.scores), ("outputs", cells.outputs)):
            assert vars(alone)[part].tobytes() == whole[own].tobytes()
        out = said("pnet", (image[None].astype(np.float32) - 127.5) / 128)[0]
        likely = 1 / (1 + np.exp(out[..., 4] - out[..., 5]))
        assert own.sum() == likely.size
        x, y = cells.places[own].T
        assert (np.diff(y * likely.shape[1] + x) > 0).all()  # from left to right, from the top downwards
        np.testing.assert_allclose(cells.scores[own], likely[y, x], atol=1e-5)
        np.testing.assert_allclose(cells.outputs[own], out[y, x, :4], atol=1e-4)


def test_cells_below_the_threshold_are_left_out(networks: Networks) -> None:
    images = [scenes()["a group"]]
    level = Level(0, 144, 228)
    everything, some = (networks.cells(images, [level], threshold) for threshold in (1e-30, 0.6))
    chosen = everything.scores >= 0.6
    assert 0 < chosen.sum() < len(chosen)
    for part in ("places", "scores", "outputs"):
        assert vars(some)[part].tobytes() == vars(everything)[part][chosen].tobytes()


def test_no_photographs_have_no_cells(networks: Networks) -> None:
    assert networks.cells([], [], 0.6).outputs.shape == (0, 4)


def test_the_trained_layers_are_those_of_the_paper() -> None:
    """Channels of the authors' release, from three to the heads'."""
    assert {name: [layer.kernel.shape[-1] for layer in layers(name)] for name in ("pnet", *SIDES)} == {
        "pnet": [10, 16, 32, 6],
        "rnet": [28, 48, 64, 128, 6],
        "onet": [32, 64, 64, 128, 256, 16],
    }
