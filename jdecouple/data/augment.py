"""Image augmentation on the device: pure functions of a batch and one key per example."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdecouple._errors import choices, require_int, require_one_of

Batch = dict[str, Any]

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
JITTER_PROBABILITY = 0.8
GRAYSCALE_PROBABILITY = 0.2
OPTIONS = {"crop_padding": None, "crop_mode": "zeros", "cutout": 0}  # of `get`, with defaults

_PADDING = {"zeros": "constant", "reflect": "reflect"}  # as NumPy calls it
_CUTOUT = 64  # folded into the key of a view, which is split into fewer parts


def get(
    name: str,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    crop_padding: int | None = None,
    crop_mode: str = "zeros",
    cutout: int = 0,
) -> Callable[..., Batch]:
    """Returns an augmentation by name.

    >>> augmentation = get("two_views", mean=(0.5,), std=(0.25,))
    >>> batch = {"x": jnp.zeros((4, 8, 8, 1), jnp.uint8), "label": jnp.arange(4)}
    >>> batch = augmentation(batch, jax.random.split(jax.random.key(0), 4), train=True)
    >>> batch["x"].shape, batch["label"].shape
    ((8, 8, 8, 1), (8,))

    - `none`: normalisation only.
    - `crop`: pad by an eighth of the size with zeros (4 pixels for 32) and crop at random. The
      padding is done before the normalisation.
    - `basic`: `crop`, then flip left-right with probability 1/2.
    - `strong`: `basic`, then colour jitter with probability 0.8 and grayscale with probability
      0.2. The jitter is that of torchvision's `ColorJitter(0.4, 0.4, 0.4, 0.1)`, as the
      published contrastive and local-learning code uses it, in the fixed order brightness,
      contrast, saturation, hue (torchvision draws the order). Images of one channel get
      brightness and contrast only.
    - `two_views`: the batch twice along its first axis, first a `basic` view of every example,
      then a `strong` one (SCPL, arXiv 2602.00062); labels and other entries of the batch that
      have one row per example are repeated in the same way.

    The transform takes a batch (`x`: uint8, or float in 0..1, [n, H, W, C]), typed PRNG keys [n]
    and `train`, a Python bool, and returns the batch with `x` as float32, `(x - mean) / std`. The
    view of an example depends on its image and its key only, so microbatches and sharding do not
    change it. Without `train` images are only normalised, never doubled, and keys may be None.

    Args:
        name: one of the names above.
        mean: per-channel mean of the images on the scale 0..1.
        std: per-channel standard deviation on the same scale, all positive.
        crop_padding: pixels of padding on each side for views that crop; None is an eighth of the
            size.
        crop_mode: what the padding holds: "zeros", or "reflect", the image mirrored at its
            outermost pixels.
        cutout: side, in pixels, of a square of the mean colour (0 after the normalisation) that
            covers a part of every view; 0 is none. Its centre is any pixel with the same
            probability, and it is clipped at the borders (DeVries and Taylor, arXiv 1708.04552).

    Raises:
        ValueError: an unknown name, `mean` and `std` that are not as many positive figures, or
            options that are none or that the augmentation does not use.
    """
    if name not in _VIEWS:
        raise ValueError(f"unknown augmentation {name!r}: {choices(name, names())}")
    if len(mean) != len(std) or not all(value > 0 for value in std):
        raise ValueError(
            f"mean is {tuple(mean)} and std {tuple(std)}: as many of each, and std above 0, are "
            "needed"
        )
    require_one_of(_PADDING, crop_mode=crop_mode)
    require_int(0, cutout=cutout)
    if crop_padding is not None:
        require_int(0, crop_padding=crop_padding)
    for key, value in {"crop_padding": crop_padding, "crop_mode": crop_mode}.items():
        if value != OPTIONS[key] and not _VIEWS[name]:
            cropping = ", ".join(each for each in names() if _VIEWS[each])
            raise ValueError(
                f"{key} is {value!r}, but augmentation {name!r} does not crop: {cropping} do"
            )
    views: list[View] = [
        functools.partial(view, padding=crop_padding, mode=crop_mode) for view in _VIEWS[name]
    ]
    # Python floats stay constants of whatever is compiled, whichever device that is for.
    offset, scale = tuple(map(float, mean)), tuple(map(float, std))
    if cutout:
        plain: list[View] = [lambda key, image: _to_unit(image)]
        views = [functools.partial(_cut_view, view, cutout, offset) for view in views or plain]

    def transform(batch: Batch, keys: jax.Array | None, train: bool) -> Batch:
        images = batch["x"]
        if images.ndim != 4 or images.shape[-1] != len(offset):
            raise ValueError(f"x is {images.shape}: [n, H, W, {len(offset)}] is needed")
        require_fit(images.shape[1:3], crop_padding, cutout)
        if not train or not views:
            return batch | {"x": _normalise(_to_unit(images), offset, scale)}
        if keys is None or keys.shape != images.shape[:1]:
            raise ValueError(
                f"keys are {getattr(keys, 'shape', None)}: one key for each of {images.shape[0]} "
                "examples is needed"
            )
        drawn = [
            jax.vmap(view)(jax.vmap(jax.random.fold_in, (0, None))(keys, number), images)
            for number, view in enumerate(views)
        ]
        augmented = drawn[0] if len(drawn) == 1 else jnp.concatenate(drawn)
        rest = {key: value for key, value in batch.items() if key != "x"}

        def repeat_rows(leaf: Any) -> Any:
            has_rows = jnp.ndim(leaf) > 0 and jnp.shape(leaf)[0] == images.shape[0]
            return jnp.concatenate([leaf] * len(views)) if has_rows else leaf

        if len(views) > 1:
            rest = jax.tree.map(repeat_rows, rest)
        return rest | {"x": _normalise(augmented, offset, scale)}

    return transform


def names() -> tuple[str, ...]:
    """The names that `get` knows."""
    return tuple(_VIEWS)


def require_fit(size: Sequence[int], crop_padding: int | None, cutout: int) -> None:
    """Raises ValueError for what is too large for images of this height and width, in pixels."""
    side = min(size)
    if crop_padding is not None and crop_padding >= side:
        raise ValueError(
            f"crop_padding is {crop_padding}: a number below the images' side, {side}, is needed"
        )
    if cutout > side:
        raise ValueError(f"cutout is {cutout}: at most the images' side, {side}, is allowed")


def crop_view(
    key: jax.Array, image: jax.Array, *, padding: int | None = None, mode: str = "zeros"
) -> jax.Array:
    """Random pad-and-crop of one image [H, W, C]; float32 in 0..1."""
    return _to_unit(_cropped(jax.random.split(key)[0], image, padding, mode))


def basic_view(
    key: jax.Array, image: jax.Array, *, padding: int | None = None, mode: str = "zeros"
) -> jax.Array:
    """Random pad-and-crop and flip of one image [H, W, C]; float32 in 0..1."""
    import dm_pix as pix  # only here, as most programs augment nothing

    crop_key, flip_key = jax.random.split(key)
    cropped = _cropped(crop_key, image, padding, mode)
    return _to_unit(pix.random_flip_left_right(flip_key, cropped))


def strong_view(
    key: jax.Array, image: jax.Array, *, padding: int | None = None, mode: str = "zeros"
) -> jax.Array:
    """`basic_view`, then colour jitter and grayscale, each by chance; float32 in 0..1."""
    view_key, jitter_key, apply_key, gray_key = jax.random.split(key, 4)
    image = basic_view(view_key, image, padding=padding, mode=mode)
    apply = jax.random.bernoulli(apply_key, JITTER_PROBABILITY)
    image = jnp.where(apply, colour_jitter(jitter_key, image), image)
    gray = jax.random.bernoulli(gray_key, GRAYSCALE_PROBABILITY)
    return jnp.where(gray, _luma(image), image)


def colour_jitter(key: jax.Array, image: jax.Array) -> jax.Array:
    """Changes brightness, contrast, saturation and hue of one image by random amounts.

    Each of the first three blends the image with black, with its mean luma or with its own luma,
    by a factor from `1 +- strength`; hue is shifted by up to 0.1 of a turn. The result is clipped
    to 0..1 after each, as torchvision does. The image is float32 [H, W, 1 or 3] in 0..1.
    """
    import dm_pix as pix

    brightness, contrast, saturation, hue = jax.random.uniform(key, (4,), jnp.float32, -1.0)
    image = _blend(image, 0.0, 1 + JITTER["brightness"] * brightness)
    image = _blend(image, _luma(image).mean(), 1 + JITTER["contrast"] * contrast)
    if image.shape[-1] == 1:
        return image
    image = _blend(image, _luma(image), 1 + JITTER["saturation"] * saturation)
    return pix.adjust_hue(image, JITTER["hue"] * hue)


View = Callable[..., jax.Array]  # of a key and an image

_VIEWS: dict[str, tuple[View, ...]] = {
    "none": (),
    "basic": (basic_view,),
    "crop": (crop_view,),
    "strong": (strong_view,),
    "two_views": (basic_view, strong_view),
}


def _cropped(key: jax.Array, image: jax.Array, padding: int | None, mode: str) -> jax.Array:
    """A random window of the padded image, as large as the image."""
    import dm_pix as pix

    height, width, _ = image.shape
    vertical, horizontal = (height // 8, width // 8) if padding is None else (padding, padding)
    sides = ((vertical, vertical), (horizontal, horizontal), (0, 0))
    return pix.random_crop(key, jnp.pad(image, sides, mode=_PADDING[mode]), image.shape)


def _cut_view(
    view: View, side: int, colour: Sequence[float], key: jax.Array, image: jax.Array
) -> jax.Array:
    """A view with a square of one colour at a random place; float32 in 0..1."""
    inside = []
    keys = jax.random.split(jax.random.fold_in(key, _CUTOUT))
    for each, length in zip(keys, image.shape[:2], strict=True):
        first = jax.random.randint(each, (), 0, length, jnp.int32) - side // 2
        pixels = jnp.arange(length)
        inside.append((first <= pixels) & (pixels < first + side))
    hole = inside[0][:, None, None] & inside[1][:, None]
    return jnp.where(hole, jnp.asarray(colour, jnp.float32), view(key, image))


def _blend(image: jax.Array, other: jax.Array | float, factor: jax.Array) -> jax.Array:
    return jnp.clip(other + factor * (image - other), 0.0, 1.0)


def _luma(image: jax.Array) -> jax.Array:
    import dm_pix as pix

    return image if image.shape[-1] == 1 else pix.rgb_to_grayscale(image)


def _to_unit(images: jax.Array) -> jax.Array:
    scaled = images.astype(jnp.float32)
    return scaled / 255 if images.dtype == jnp.uint8 else scaled


def _normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
