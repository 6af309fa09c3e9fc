"""A tiny BLIP captioner."""

from pathlib import Path

import torch
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil

WORDS = (
    "a",
    "cartoon",
    "of",
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "house",
    "in",
    "the",
    "rain",
    "with",
    "hat",
    "and",
    "tree",
)


def make_blip(folder: Path, silent: bool = False) -> Path:
    """A tiny BLIP captioner with random weights; a `silent` one ends every caption at once."""
    torch.manual_seed(3)
    vocabulary = {
        token: index
        for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "[DEC]"])
    }
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": vocabulary["[DEC]"], "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text = {
        **sizes,
        **ends,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 24,
        "initializer_range": 0.6,
    }
    vision = {**sizes, "image_size": 32, "patch_size": 8, "initializer_range": 0.6}
    model = BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config=vision, projection_dim=16, initializer_range=0.6)
    )
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[:5] = -1000.0  # words only
        if silent:
            model.text_decoder.cls.predictions.bias[3] = 1000.0
    model.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    BertTokenizer(vocab=vocabulary, bos_token="[DEC]").save_pretrained(folder)
    return folder
