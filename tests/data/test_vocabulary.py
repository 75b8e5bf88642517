"""Words and their numbers, and vectors from a file."""

import numpy as np
import pytest

from jdecouple.data import Vocabulary, word_vectors


def words_of(*texts, max_length=99):
    """What a vocabulary of some texts splits them into."""
    vocabulary = Vocabulary.of(texts, 1000)
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
