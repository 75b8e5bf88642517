"""What papers take out of texts before they count words: markup, punctuation, stop words."""

from __future__ import annotations

import re
import string

from jdecouple._errors import require_one_of

NAMES = ("none", "punctuation", "paper")

# English function words and the pieces that contractions leave, in small letters. Contractions
# themselves ("don't") lose their apostrophe before words are compared, and stay ("dont").
_PRONOUNS = """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she
    her hers herself it its itself they them their theirs themselves what which who whom this that
    these those
"""
_VERBS = """
    am is are was were be been being have has had having do does did doing can will should
"""
_LINKS = """
    a an the and but if or because as until while of at by for with about against between into
    through during before after above below to from up down in out on off over under
"""
_ADVERBS = """
    again further then once here there when where why how all any both each few more most other
    some such no nor not only own same so than too very just now
"""
_PIECES = """
    s t d ll m o re ve y don ain aren couldn didn doesn hadn hasn haven isn ma mightn mustn needn
    shan shouldn wasn weren won wouldn
"""
STOP_WORDS = frozenset(" ".join((_PRONOUNS, _VERBS, _LINKS, _ADVERBS, _PIECES)).split())
_MARKUP = re.compile("<.*?>")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def cleaned(text: str, how: str) -> str:
    """Takes out of a text what a paper's code takes out.

    >>> cleaned("It isn't <b>The</b> well-made film, is it?", "paper")
    'isnt wellmade film'
    >>> cleaned("It isn't <b>The</b> well-made film, is it?", "punctuation")
    'it isnt the wellmade film is it'

    `paper` is what DeInfoReg (arXiv 2506.18193) and SCPL (arXiv 2602.00062) do to AG News and
    DBpedia, in this order: small letters; `<...>` is left out, with nothing in its place; so are
    the 32 signs of ASCII that are neither letters, digits nor spaces, apostrophes, hyphens and `_`
    among them; what stands between spaces is a word, and the 153 `STOP_WORDS` are left out.
    `punctuation` is all but the last, what their code does to IMDB. Other signs, such as curled
    quotation marks, stay in their words.

    Args:
        text: any text.
        how: one of `NAMES`; "none" leaves the text as it is.

    Returns:
        Words with one space between them; "" may be left.

    Raises:
        ValueError: an unknown name.
    """
    require_one_of(NAMES, clean=how)
    if how == "none":
        return text
    words = _MARKUP.sub("", text.lower()).translate(_WITHOUT_PUNCTUATION).split()
    return " ".join(words if how == "punctuation" else [w for w in words if w not in STOP_WORDS])
