"""Words and their numbers, and vectors from a file."""

import numpy as np
import pytest

from jdecouple.data import Vocabulary, word_vectors
from jdecouple.data.cleaning import STOP_WORDS, cleaned


def words_of(*texts, max_length=99, clean="none"):
    """What a vocabulary of some texts splits them into."""
    vocabulary = Vocabulary.of(texts, 1000, clean)
    numbers, lengths = vocabulary.encode(texts, max_length)
    assert lengths.sum() == len(numbers)
    return [vocabulary.words[number] for number in numbers]


class TestVocabulary:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("The THE\tthe\n\n the", ["the"] * 4),
            ("so good.<br /><BR>So", ["so", "good", ".", "so"]),
            ("it 's n't don't Ann\u2019s", ["it", "'s", "n't", "don't", "ann's"]),
            ("'quoted' ``too''", ["'", "quoted", "'", "``", "too", "''"]),
            ("well-known ... ?!", ["well", "-", "known", "...", "?", "!"]),
            ("É 4 [unknown]", ["é", "4", "[", "unknown", "]"]),
            ("na\u00efve NAI\u0308VE \u01f0 J\u030c", ["na\u00efve"] * 2 + ["\u01f0"] * 2),
        ],
    )
    def test_cleaning(self, text, words):
        assert words_of(text) == words

    def test_frequent_words_first_and_equals_by_letter(self):
        texts = ["c b a", "d b a", "e b"]
        vocabulary = Vocabulary.of(texts, 5)
        assert vocabulary.words == ("[padding]", "[unknown]", "b", "a", "c")
        assert len(vocabulary) == 5
        numbers, lengths = vocabulary.encode(["a b d zebra", "c"], 3)
        assert (numbers.tolist(), lengths.tolist()) == ([3, 2, 1, 4], [3, 1])

    def test_of_many_texts_in_any_order(self):
        generator = np.random.default_rng(0)
        texts = [" ".join(f"w{n}" for n in row) for row in generator.integers(0, 400, (2000, 9))]
        assert Vocabulary.of(texts, 300).words == Vocabulary.of(texts[::-1], 300).words

    def test_no_word_of_a_text_is_padding(self):
        vocabulary = Vocabulary.of(["some [padding] [unknown]"], 100)
        numbers, lengths = vocabulary.encode(["[padding]", "", "  <br>", "[unknown]"], 9)
        assert lengths.tolist() == [3, 1, 1, 3]
        assert (numbers > 0).all()
        assert numbers[3] == numbers[4] == 1

    def test_more_texts_than_are_encoded_at_once(self):
        texts = ["a"] * 9000 + ["a b"]
        numbers, lengths = Vocabulary.of(texts, 9).encode(texts, 9)
        assert len(lengths) == 9001
        assert numbers[-2:].tolist() == [2, 3]


class TestCleaning:
    """Worked out by hand from what the papers' code does to a text."""

    @pytest.mark.parametrize(
        ("text", "punctuation", "paper"),
        [
            ("", "", ""),
            ("It is what it was.", "it is what it was", ""),
            (
                "that loves its characters and communicates something rather beautiful",
                "that loves its characters and communicates something rather beautiful",
                "loves characters communicates something rather beautiful",
            ),
            # Apostrophes go first, so that a contraction is no stop word, but its pieces are.
            ("I don't; he'll, isn 't", "i dont hell isn t", "dont hell"),
            ("secretions from the parental units ", None, "secretions parental units"),
            # Nothing stands in the place of markup and signs, not even a space.
            ("The end.<br /><br />Well-made, 4/10 & snake_case", None, "endwellmade 410 snakecase"),
            ("1 < 2 and 3 > 2", "1 2", "1 2"),
            ("a <b\n> c", "a b c", "b c"),
            ("\u201cThe film\u201d\u2019s\u00a0NO good", None, "\u201cthe film\u201d\u2019s good"),
            (
                " Abbott of Farnham E D Abbott Limited was a British coachbuilding business.",
                "abbott of farnham e d abbott limited was a british coachbuilding business",
                "abbott farnham e abbott limited british coachbuilding business",
            ),
        ],
    )
    def test_sentences(self, text, punctuation, paper):
        assert cleaned(text, "none") == text
        assert cleaned(text, "paper") == paper
        if punctuation is not None:
            assert cleaned(text, "punctuation") == punctuation

    def test_stop_words_can_be_met(self):
        """Each is what cleaning leaves of it, so that none is a line without effect."""
        assert len(STOP_WORDS) == 153
        for word in STOP_WORDS:
            assert cleaned(word, "punctuation") == word
            assert cleaned(f"{word.upper()}!", "paper") == ""

    def test_words_are_what_stands_between_spaces(self):
        texts = ["The \u201cnai\u0308ve\u201d, un-cut film", "A FILM... isn't Ann\u2019s"]
        wanted = ["\u201cna\u00efve\u201d", "uncut", "film", "film", "isnt", "ann\u2019s"]
        assert words_of(*texts, clean="paper") == wanted
        kept = ["the", *wanted[:3], "a", *wanted[3:]]
        assert words_of(*texts, clean="punctuation") == kept

    def test_length_is_that_of_what_is_left(self):
        assert words_of("it is the best of the best films", max_length=3, clean="paper") == [
            *("best", "best", "films")
        ]
        numbers, lengths = Vocabulary(("film",), "paper").encode(["it is the", "the film"], 9)
        assert (numbers.tolist(), lengths.tolist()) == ([1, 2], [1, 1])

    def test_unknown(self):
        said = "clean is 'papers': allowed are none, punctuation, paper; did you mean 'paper'"
        for refuse in (lambda: Vocabulary((), "papers"), lambda: cleaned("a", "papers")):
            with pytest.raises(ValueError, match=said):
                refuse()


@pytest.fixture
def glove(tmp_path):
    def write(text):
        path = tmp_path / "vectors.txt"
        path.write_text(text, encoding="utf-8")
        return path

    return write


class TestWordVectors:
    WORDS = ("[padding]", "[unknown]", "the", "rare", "film")

    def test_rows_are_those_of_the_vocabulary(self, glove):
        path = glove("film 1 2 3\nother 9 9 9\nthe -0.5 0 1e-3\n")
        vectors = word_vectors(path, self.WORDS, seed=0)
        assert (vectors.shape, vectors.dtype) == ((5, 3), np.float32)
        np.testing.assert_array_equal(
            vectors[[0, 2, 4]], np.float32([[0] * 3, [-0.5, 0, 1e-3], [1, 2, 3]])
        )
        assert (vectors[[1, 3]] != 0).all()

    def test_words_without_a_vector_are_drawn_by_seed(self, glove):
        words = (*self.WORDS, *(f"w{n}" for n in range(2000)))
        drawn = word_vectors(glove("the 1 2 3\n"), words, seed=1)[5:]
        assert drawn.std() == pytest.approx(0.1, rel=0.05)
        assert abs(drawn.mean()) < 0.01
        # Whatever other words the file has.
        again = word_vectors(glove("the 1 2 3\nfilm 1 2 3\n"), words, seed=1)[5:]
        np.testing.assert_array_equal(drawn, again)
        assert (word_vectors(glove("the 1 2 3\n"), words, seed=2)[5:] != drawn).any()

    def test_header_of_word2vec_and_words_with_spaces(self, glove):
        vectors = word_vectors(
            glove("2 3\nthe 1 2 3\nat the film 4 5 6\nfilm 7 8 9\n"), self.WORDS, 0
        )
        np.testing.assert_array_equal(vectors[[2, 4]], [[1, 2, 3], [7, 8, 9]])

    @pytest.mark.parametrize("first", ["", "2 3\n"])
    def test_byte_order_mark(self, glove, first):
        vectors = word_vectors(glove(f"\ufeff{first}the 1 2 3\n"), self.WORDS, 0)
        np.testing.assert_array_equal(vectors[2], [1, 2, 3])

    def test_a_word_in_either_normal_form(self, glove):
        words = (*self.WORDS[:2], *words_of("na\u00efve"))
        for written in ("na\u00efve", "nai\u0308ve"):
            vectors = word_vectors(glove(f"{written} 1 2 3\n"), words, 0)
            np.testing.assert_array_equal(vectors[2], [1, 2, 3])

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("the 1 2 3\nfilm 1 2\n", r"line 2 has 2 numbers: 3 are needed"),
            ("the 1 2 3\nfilm 1 x 3\n", r"line 2: a word and 3 finite numbers are needed"),
            ("the 1 nan 3\n", r"line 1: a word and 3 finite"),
            ("le 1 2 3\n", r"none of the 3 words"),
            ("", r"none of the 3 words"),
            ("the\nfilm\n", r"none of the 3 words"),
        ],
    )
    def test_bad_files(self, glove, text, said):
        with pytest.raises(ValueError, match=said) as error:
            word_vectors(glove(text), self.WORDS, 0)
        assert "\n" not in str(error.value)
