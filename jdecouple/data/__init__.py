"""Data: sets by name, batches by grain, prefetch to devices, augmentation on the device."""

from jdecouple.data import augment
from jdecouple.data.batches import evaluation_batches, steps_per_epoch, train_batches
from jdecouple.data.groups import Groups, group_sizes
from jdecouple.data.inputs import ImageInputs, TextInputs
from jdecouple.data.loaders import load, names, register
from jdecouple.data.noise import symmetric_label_noise
from jdecouple.data.prefetch import Prefetcher
from jdecouple.data.sources import channel_statistics
from jdecouple.data.splits import Dataset, ImageDataset, Source, Split, from_arrays
from jdecouple.data.texts import TextDataset
from jdecouple.data.token_inputs import TokenInputs
from jdecouple.data.tokenizer import Tokenizer
from jdecouple.data.tokens import TokenDataset
from jdecouple.data.vocabulary import Vocabulary, word_vectors

__all__ = [
    "Dataset",
    "Groups",
    "ImageDataset",
    "ImageInputs",
    "Prefetcher",
    "Source",
    "Split",
    "TextDataset",
    "TextInputs",
    "TokenDataset",
    "TokenInputs",
    "Tokenizer",
    "Vocabulary",
    "augment",
    "channel_statistics",
    "evaluation_batches",
    "from_arrays",
    "group_sizes",
    "load",
    "names",
    "register",
    "steps_per_epoch",
    "symmetric_label_noise",
    "train_batches",
    "word_vectors",
]
