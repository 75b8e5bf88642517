"""Data sets by name: the table of their loaders, and `load`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

from jdecouple._errors import require_int
from jdecouple.data import sources, texts, tfds_sets, tfds_texts, tokens
from jdecouple.data.noise import symmetric_label_noise
from jdecouple.data.splits import CACHE_BYTES, Dataset, ImageDataset

# A name that ends in a colon has a PATH after it; its loader takes the name.
_LOADERS: dict[str, Callable[..., Dataset]] = {
    "digits": sources.digits,
    "synthetic": sources.synthetic,
    "folder:": sources.folder,
    "csv:": sources.table,
    "parquet:": sources.table,
    "topics": tokens.topics,
    "stdlib": tokens.standard_library,
    "text:": tokens.files,
}
_BUILT_IN = frozenset(_LOADERS)
_WHERE = ("data_dir", "download")  # of TFDS's sets alone, but for loaders that name them
_ALWAYS = {"seed", "cache_bytes"}
_OF_IMAGES = ("mean", "std")  # which `load` sets itself
_LEAST = {"seed": 0, "image_size": 1, "max_length": 1, "vocabulary_size": 3}


def names() -> tuple[str, ...]:
    """Names that `load` knows besides TFDS's; after those with a colon a PATH follows."""
    return tuple(_LOADERS)


def options() -> dict[str, tuple[str, ...]]:
    """The options of `load` that each of `names()` takes, and those that TFDS's sets take.

    >>> options()["digits"]
    ('validation', 'label_noise', 'image_size', 'mean', 'std')
    """
    tfds = {"images of TFDS": sources.prepared_images, "texts of TFDS": texts.dataset}
    tfds["texts of TFDS without labels"] = tokens.prepared
    taken = {name: {"label_noise", *_takes(loader)} for name, loader in _LOADERS.items()}
    taken |= {name: {"label_noise", *_WHERE, *_takes(loader)} for name, loader in tfds.items()}
    for keys in taken.values():
        keys -= {"label_noise"} if "tokenizer" in keys else set()
    taken = {n: {*keys, *(_OF_IMAGES if "image_size" in keys else ())} for n, keys in taken.items()}
    known = [key for key in _takes(load) if key != "name" and key not in _ALWAYS]
    return {name: tuple(key for key in known if key in keys) for name, keys in taken.items()}


def _takes(loader: Any) -> tuple[str, ...]:
    """Names of what a loader takes; one of tokens hands on what it does not name itself."""
    parameters = inspect.signature(loader).parameters
    handed_on = inspect.signature(tokens.dataset).parameters if "options" in parameters else ()
    return (*parameters, *handed_on)


def register(name: str, loader: Callable[..., Dataset]) -> None:
    """Adds a data set; `load`, configurations and the command line then know its name.

    A name that was registered before is replaced, so that a notebook's cell may run twice.

    >>> import numpy as np
    >>> import jdecouple as jd
    >>> def noise(seed):
    ...     pixels = np.random.default_rng(seed).uniform(size=(12, 4, 4, 1))
    ...     split = jd.data.from_arrays(pixels, np.arange(12) % 2, num_classes=2)
    ...     mean, std = jd.data.channel_statistics(split)
    ...     return jd.data.ImageDataset("noise", split, split, split, 2, (4, 4, 1), mean, std)
    >>> jd.data.register("noise", noise)
    >>> jd.data.load("noise").num_classes
    2

    Args:
        name: what the data set is called.
        loader: returns the data set. It is called with the options of `load` that its signature
            names; `load` refuses any other value than the default of one that it does not name, but
            for `seed` and `cache_bytes`, and draws the label noise itself. Nor need it name `mean`
            and `std`, which `load` sets where they are given.

    Raises:
        ValueError: the name is a built-in set's or holds a colon, or the loader needs an argument
            that is no option of `load`.
        TypeError: the loader cannot be called.
    """
    if name in _BUILT_IN:
        raise ValueError(f"data set {name!r} is built in: register yours under another name")
    if not name or ":" in name:
        raise ValueError(f"data set name is {name!r}: one without a colon is needed")
    if not callable(loader):
        raise TypeError(f"the loader of data set {name!r} is {loader!r}: a function is needed")
    options = inspect.signature(load).parameters.keys() - {"name", "label_noise"}
    for parameter in inspect.signature(loader).parameters.values():
        if parameter.default is parameter.empty and parameter.name not in options:
            raise ValueError(
                f"the loader of data set {name!r} needs {parameter.name!r}: allowed are "
                f"{', '.join(sorted(options))}"
            )
    _LOADERS[name] = loader


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    validation: float | int | None = None,
    label_noise: float = 0.0,
    seed: int = 0,
    download: bool = False,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    synthetic_size: int = 4096,
    channels: int = 3,
    num_classes: int = 10,
    cache_bytes: int = CACHE_BYTES,
    max_length: int | None = None,
    vocabulary_size: int | None = None,
    clean: str = "none",
    glove: str | os.PathLike[str] | None = None,
    label_column: str | None = None,
    text_columns: Sequence[str] | None = None,
    parts: Sequence[int] | None = None,
    tokenizer: str = "bytes",
) -> Dataset:
    """Loads a data set with its fixed training, validation and test splits.

    >>> digits = load("digits", validation=100)
    >>> len(digits.train), len(digits.validation), len(digits.test), digits.image_shape
    (1338, 100, 359, (8, 8, 1))

    `digits` is scikit-learn's bundled set of 1,797 real 8x8 images; a fixed stratified fifth is
    the test split. `synthetic` is random, for benchmarks. `folder:PATH` is a folder of images in
    class folders, see `folders.sources`; `csv:PATH` and `parquet:PATH` are labelled texts, see
    `tables.splits`. `text:PATH` are texts to go on with, whose labels are the next tokens, see
    `corpora.from_files`; so are `stdlib`, the sources of Python's standard library, and `topics`,
    what `pydoc` says of Python. `register` adds names. Any other name is a set of images or texts
    of TensorFlow Datasets that is already prepared as `array_record`; reading it imports no
    TensorFlow. A TFDS set without a test split, or with hidden test labels, is tested on its own
    validation split. One of texts without labels is one to go on with.

    Texts become numbers of words, see `vocabulary.Vocabulary`, which is made of the training split
    alone (without what is held out of it).

    The splits depend on the data alone, never on `seed`; `seed` draws the label noise (training
    labels only), the synthetic images and the vectors of words without one. Normalisation
    statistics are known constants for the sets in `STATISTICS` (at their own size) and for
    `synthetic`, else those of the first 1,000 training images.

    Args:
        name: one of `names()` (with PATH after a colon), or a TFDS name.
        data_dir: folder of the prepared TFDS sets; None is TFDS's own. PATH begins there.
        validation: training examples (of texts to go on with: documents) to hold out: a fraction
            in [0, 1) or a count. None is the set's own validation split where it has one besides a
            test split, else a tenth.
        label_noise: share of the training labels drawn anew, in [0, 1].
        seed: of all that is drawn; not negative.
        download: prepare a TFDS set that is not prepared yet; without it nothing is downloaded.
        image_size: resize images to this many pixels a side (shorter side, then centre crop);
            the size of the synthetic images (32 if None).
        mean: per-channel mean that images, scaled to 0..1, are normalised with, one number a
            channel; None is that of the set.
        std: per-channel standard deviation likewise.
        synthetic_size: synthetic examples for training and validation together; the test split
            has a quarter as many. Other built-in sets refuse it, `channels` and `num_classes`.
        channels: channels of the synthetic images, 1 or 3.
        num_classes: classes of the synthetic set.
        cache_bytes: decoded TFDS images are kept in memory if those of a split need no more.
        max_length: words that are kept of a text, or tokens of a row; 256 if None.
        vocabulary_size: most words that are told apart, padding and the unknown word included;
            30,000 if None. Of tokenizer "bpe" all tokens, 4,096 if None.
        clean: what is taken out of texts before they are split into words: "none"; "punctuation",
            markup and ASCII punctuation; or "paper", English stop words as well, see
            `cleaning.cleaned`.
        glove: text file of word vectors, see `vocabulary.word_vectors`.
        label_column: name of the column of labels of CSV and Parquet files; None is the one called
            `label`, `class`, `target` or the like.
        text_columns: names of their columns of texts; None is all others.
        parts: words of the parts that a text is cut into, which a batch then holds as "x", "x_1",
            ..., each for the blocks that ask for it; `max_length` is their sum.
        tokenizer: what the tokens of texts to go on with are: "bytes"; "bpe", pairs of bytes that
            are merged by how often they stand in the training split; or the path of a
            `tokenizer.json` of the library `tokenizers`.

    Raises:
        ValueError: a bad argument, or a set that is unknown, not prepared, empty or without
            labels.
        FileNotFoundError: `data_dir` or the folder or file of a set does not exist.
    """
    options = {key: value for key, value in locals().items() if key not in ("name", "label_noise")}
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"data set name is {name!r}: one of {', '.join(names())} or TFDS's is needed"
        )
    for key, least in _LEAST.items():
        if options[key] is not None or key == "seed":
            require_int(least, **{key: options[key]})
    loader = _loader(name, data_dir, download)
    taken = _takes(loader)
    dataset = loader(**{key: value for key, value in options.items() if key in taken})
    if not isinstance(dataset, Dataset):
        raise TypeError(f"the loader of data set {name!r} returns {dataset!r}: a Dataset is needed")
    own = {*taken, *_ALWAYS, *(() if _registered(name) else _WHERE)}
    if isinstance(dataset, ImageDataset):
        own |= {*_OF_IMAGES}
        dataset = _normalised(dataset, mean=mean, std=std)
    parameters = inspect.signature(load).parameters
    for key, value in options.items():
        if key not in own and value != parameters[key].default:
            raise ValueError(
                f"{key} is {options[key]!r}: data set {name!r} holds {dataset.kind} and takes "
                f"only: {', '.join(key for key in options if key in own - _ALWAYS) or 'no options'}"
            )
    splits = {
        role: dataclasses.replace(getattr(dataset, role), name=role)
        for role in ("train", "validation", "test")
    }
    if label_noise and isinstance(dataset, tokens.TokenDataset):
        raise ValueError(f"label_noise is {label_noise}: the labels of tokens are the next tokens")
    noise = symmetric_label_noise(len(dataset.train), dataset.num_classes, label_noise, seed)
    if (noise >= 0).any():
        splits["train"] = dataclasses.replace(splits["train"], overrides=noise)
    return dataclasses.replace(dataset, name=name, **splits)


def _normalised(dataset: ImageDataset, **statistics: Sequence[float] | None) -> ImageDataset:
    """The data set with the statistics that are given, checked, in place of its own."""
    given: dict[str, Any] = {}
    channels = dataset.image_shape[-1]
    for key, values in statistics.items():
        if values is None:
            continue
        values = tuple(values) if isinstance(values, Iterable) else values
        several = isinstance(values, tuple) and len(values) == channels
        numbers = several and all(isinstance(x, Real) and not isinstance(x, bool) for x in values)
        if not numbers or not all(0 <= x <= 1 and (x > 0 or key == "mean") for x in values):
            bounds = "from 0 to 1" if key == "mean" else "above 0, at most 1,"
            raise ValueError(
                f"{key} is {values}: a number {bounds} for each channel is needed, of which the "
                f"images, scaled to 0..1, have {channels}"
            )
        given[key] = tuple(map(float, values))
    return dataclasses.replace(dataset, **given)


def _registered(name: str) -> Callable[..., Dataset] | None:
    scheme, colon, _ = name.partition(":")
    return _LOADERS.get(scheme + colon)


def _loader(name: str, data_dir: Any, download: bool) -> Callable[..., Dataset]:
    """The loader of a data set, which its options alone are missing from."""
    if loader := _registered(name):
        return functools.partial(loader, name) if ":" in name else loader
    builder = tfds_sets.prepared(name, data_dir=data_dir, download=download, others=names())
    if tfds_texts.holds_only_texts(builder):
        return functools.partial(tokens.prepared, name, builder)
    if tfds_texts.holds_texts(builder):
        return functools.partial(texts.dataset, name, *tfds_texts.splits(name, builder))
    return functools.partial(sources.prepared_images, name, builder)
