"""The small byte-pair vocabulary that the base model and the CLIP model share."""

from __future__ import annotations

import json

from common import PROMPTS, Concept
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer


TOKENS = 12


def build_tokenizer(concepts: list[Concept], merges: int = 1200) -> CLIPTokenizer:
    """A small byte-pair vocabulary of our own, in CLIP's form (lower case, words end in </w>)."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(unk_token=special[1], end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    words, letters = pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    # every letter also as the end of a word, so that any text can be encoded; named first and in order, since the
    # trainer would number them in an order that changes from run to run
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = special + alphabet + [letter + "</w>" for letter in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=len(first) + merges,
        special_tokens=first,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    prompts = [c for c in concepts if c.name in PROMPTS]
    texts = [c.label for c in concepts] + [" ".join(c.tags) for c in concepts]
    bpe.train_from_iterator(texts + 20 * [c.label for c in prompts], trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    pairs = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=TOKENS)
