"""Words and their numbers: cleaning, counting, encoding, and vectors from a file."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from jdecouple._errors import require_one_of
from jdecouple.data import cleaning

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PADDING, UNKNOWN = 0, 1
_RESERVED = ("[padding]", "[unknown]")  # no word of a text has brackets
_APOSTROPHE = "\u2019"  # as typographers set it
_BREAK = r"<br\s*/?>"
# A word keeps its apostrophes inside; endings ('s) and runs of one sign are words of their own.
_WORD = r"\w+(?:'\w+)*|'(?:s|t|d|m|re|ve|ll)\b|([^\w\s])\1*"
_TEXTS_AT_ONCE = 8192
_DEVIATION = 0.1  # of the vectors of words that a file does not have


class Vocabulary:
    """Numbers of words: 0 is padding, 1 any word that is not in the vocabulary.

    A text is lower-cased, HTML line breaks (`<br>`, `<br />`) become spaces, curled apostrophes
    straight ones, letters and their accents one sign each (Unicode's form NFC), and what is left
    falls into words: letters, digits and underscores with the apostrophes between them ("don't"),
    endings that stand alone ("'s", "'ll"), and runs of every other sign ("...", "-").

    With another `clean` than "none" a text is what `cleaning.cleaned` leaves of it, in the form
    NFC, and a word is what stands between spaces.

    Args:
        words: the words with the numbers 2, 3, ...
        clean: one of `cleaning.NAMES`.

    Attributes:
        words: the word of every number.
        clean: what is taken out of texts.

    Raises:
        ValueError: an unknown `clean`.
    """

    RESERVED: ClassVar[int] = len(_RESERVED)

    def __init__(self, words: Iterable[str], clean: str = "none"):
        require_one_of(cleaning.NAMES, clean=clean)
        self.words, self.clean = (*_RESERVED, *words), clean
        numbers = {word: number for number, word in enumerate(self.words)}
        self._tokenizer = _tokenizer(numbers, clean)

    @classmethod
    def of(cls, texts: Iterable[str], size: int, clean: str = "none") -> Vocabulary:
        """The most frequent words of some texts, equally frequent ones in alphabetical order.

        There are at most `size` numbers, the two reserved ones included.
        """
        from tokenizers import trainers

        require_one_of(cleaning.NAMES, clean=clean)
        tokenizer = _tokenizer({}, clean)
        trainer = trainers.WordLevelTrainer(
            vocab_size=size - len(_RESERVED), show_progress=False, special_tokens=[]
        )
        tokenizer.train_from_iterator((cleaning.cleaned(text, clean) for text in texts), trainer)
        numbers = tokenizer.get_vocab()
        return cls(sorted(numbers, key=numbers.__getitem__), clean)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the first `max_length` words of n texts.

        Returns:
            The numbers of all texts, one after another, int32; and how many each has, int32 [n], at
            least 1: a text without words is one unknown word.
        """
        self._tokenizer.enable_truncation(max_length)
        numbers, lengths = [], []
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            part = [cleaning.cleaned(x, self.clean) for x in texts[first : first + _TEXTS_AT_ONCE]]
            for encoding in self._tokenizer.encode_batch_fast(part, add_special_tokens=False):
                numbers.append(np.array(encoding.ids or [UNKNOWN], np.int32))
                lengths.append(len(numbers[-1]))
        return np.concatenate([np.zeros(0, np.int32), *numbers]), np.array(lengths, np.int32)


def padded(
    numbers: np.ndarray, starts: np.ndarray, lengths: np.ndarray, max_length: int
) -> np.ndarray:
    """Texts as rows, int32 [n, max_length], padded behind.

    Args:
        numbers: of the words of all texts, one after another.
        starts: where each of n texts begins there.
        lengths: words of each.
        max_length: of a row.
    """
    position = np.arange(max_length)
    real = position < lengths[:, None]
    words = np.full(real.shape, PADDING, np.int32)
    words[real] = numbers[(starts[:, None] + position)[real]]
    return words


def word_vectors(path: str | os.PathLike[str], words: Sequence[str], seed: int) -> np.ndarray:
    """Vectors of words from a text file such as those of GloVe: a word and its numbers a line.

    A first line of two whole numbers, as word2vec writes it, is passed over.

    Args:
        path: the file, in UTF-8, with or without a byte order mark.
        words: the words of a `Vocabulary`, padding first.
        seed: of the words that the file does not have.

    Returns:
        float32 [len(words), width]; row i is the vector of word i. Padding is 0; words that are not
        in the file are normal with deviation 0.1, whatever else is in the file.

    Raises:
        ValueError: a line has another number of values, or ones that are no finite numbers, or the
            file has none of the words.
        OSError: the file cannot be read.
    """
    rows = {word: row for row, word in enumerate(words) if row > UNKNOWN}
    generator = np.random.Generator(np.random.PCG64(seed))
    vectors: np.ndarray | None = None
    missing = set(rows)
    with Path(path).expanduser().open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            values = line.rstrip().split(" ")
            if number == 1 and len(values) == 2 and all(map(str.isdecimal, values)):
                continue
            if vectors is None:
                shape = len(words), len(values) - 1
                vectors = generator.normal(0, _DEVIATION, shape).astype(np.float32)
                vectors[PADDING] = 0
            where, width = f"glove file '{path}', line {number}", vectors.shape[1]
            # Some files have words with spaces.
            word = unicodedata.normalize("NFC", " ".join(values[:-width]))
            if len(values) <= width:
                raise ValueError(
                    f"{where} has {len(values) - 1} numbers: {width} are needed, as in the first"
                )
            if word in missing:
                vectors[rows[word]] = _finite(values[-width:], where)
                missing.remove(word)
    if vectors is None or not vectors.size or len(missing) == len(rows):
        raise ValueError(f"glove file '{path}' has none of the {len(rows)} words of the vocabulary")
    return vectors


def _finite(values: list[str], where: str) -> np.ndarray:
    try:
        vector = np.array(values, np.float32)
    except ValueError:
        vector = np.full(len(values), np.nan, np.float32)
    if not np.isfinite(vector).all():
        raise ValueError(f"{where}: a word and {len(values)} finite numbers are needed")
    return vector


def _tokenizer(numbers: dict[str, int], clean: str) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=_RESERVED[UNKNOWN]))
    if clean != "none":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return tokenizer
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.NFC(),  # behind it: some lower letters are one sign, their capitals two
            normalizers.Replace(_APOSTROPHE, "'"),
            normalizers.Replace(Regex(_BREAK), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), "removed", invert=True)
    return tokenizer
