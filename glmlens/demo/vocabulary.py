"""Make the tokenizer of the demo model: a token per word of its training text, bytes for the rest."""

import functools
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from glmlens.demo.world import generate_vocabulary_texts
from glmlens.text.tokenizer import GLM4_SPECIAL_TOKENS, GLM4_SPLIT_PATTERN

# GLM-4's split pattern with digits in pairs: a year has one token for the century and one for the year within it.
DEMO_SPLIT_PATTERN = GLM4_SPLIT_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}{1,2}")
DEMO_CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for item in messages %}{% if item['content'] %}<|{{ item['role'] }}|>\n{{ item['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def make_tokenizer() -> Tokenizer:
    """Return the tokenizer, with GLM-4's special tokens and its prefix `[gMASK]<sop>`."""
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(DEMO_SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pieces: dict[str, None] = {}
    for text in generate_vocabulary_texts():
        without_special = re.sub(r"<\|\w+\|>", "", text)
        pieces.update(dict.fromkeys(piece for piece, _ in pre_tokenizer.pre_tokenize_str(without_special)))
    # All single bytes first, so that every text can be encoded; then the words in a fixed order.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, *sorted(p for p in pieces if p not in alphabet)])}
    # A piece that is in the vocabulary is one token; any other one falls back to its bytes, as there are no merges.
    engine = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    engine.pre_tokenizer = pre_tokenizer
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in GLM4_SPECIAL_TOKENS])
    ids = [(token, engine.token_to_id(token)) for token in ("[gMASK]", "<sop>")]
    engine.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", pair="[gMASK] <sop> $A $B", special_tokens=ids
    )
    return engine
