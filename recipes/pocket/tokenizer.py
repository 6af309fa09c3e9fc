"""Train a small byte-pair vocabulary in CLIP's format."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from recipes.pocket.config import MAX_TOKENS

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: list[str], vocab_size: int) -> CLIPTokenizer:
    """Learn `vocab_size` tokens (the last two are the start and the end) from the captions.

    Normalisation and word splitting are CLIP's own, taken from an empty `CLIPTokenizer`.
    """
    clip = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=vocab_size - 2, end_of_word_suffix="</w>", show_progress=False, min_frequency=2
    )
    learner.train_from_iterator(captions, trainer)
    vocab = learner.get_vocab()
    # Letters and digits may stand inside a word or end it: both forms must exist for unseen words.
    for letter in "abcdefghijklmnopqrstuvwxyz0123456789'":
        for token in (letter, f"{letter}</w>"):
            vocab.setdefault(token, len(vocab))
    for token in (START, END):
        vocab[token] = len(vocab)
    merges = _merges(learner)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the folder with the fast form and with CLIP's classic `vocab.json` and `merges.txt`."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def _merges(learner: Tokenizer) -> list[tuple[str, str]]:
    import json

    merges = json.loads(learner.to_str())["model"]["merges"]
    return [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in merges]
