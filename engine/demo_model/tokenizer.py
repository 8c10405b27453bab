"""The tokenizer and the chat template, trained on the generator's own text.

text ─► words, single digits, marks ─► byte-level BPE ─► at most 2,560 tokens
        text whose names are common ones, and the syllables of invented names each by itself:
        no merge crosses two syllables, so an invented name is a few tokens that other names share
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .text import conversation
from .words import COMMON_NAMES, NOUNS, SYLLABLES, Words

PAD, BEGIN, END, SYSTEM, USER, ASSISTANT = SPECIALS = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
VOCAB_SIZE = 2560
CONTEXT_LEN = 4096
_NUM_TEXTS = 8000
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHOT = "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('a message has the role system, user or assistant, not ' + message['role']) }}{% endif %}"
    + _SHOT
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(seed: int = 11, num_texts: int = _NUM_TEXTS) -> Tokenizer:
    """A byte-level BPE tokenizer trained on `num_texts` conversations; raw text is encoded behind one begin token."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORD), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, num_texts), trainer)
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, begin)]),
        ]
    )
    return tokenizer


class _CommonWords(Words):
    """Words whose names are common ones with a digit behind, and nouns."""

    def invented(self, rng: Random, tails: Sequence[str]) -> str:
        return f"{rng.choice(COMMON_NAMES)}{rng.randrange(10)}"

    def name(self, rng: Random) -> str:
        return rng.choice(NOUNS).capitalize()

    def letters(self, rng: Random) -> str:
        return self.invented(rng, [])


def _texts(seed: int, num_texts: int) -> Iterator[str]:
    words = _CommonWords("train")
    for index in range(num_texts):
        for turn in conversation(Random(f"tokenizer {seed} {index}"), words, 1500).turns:
            yield turn.text
    for syllable in SYLLABLES:
        spellings = (syllable, f" {syllable}", syllable.lower(), f" {syllable.lower()}") if syllable[0].isupper() else (syllable,)
        for spelling in spellings:
            yield from [spelling] * (num_texts // 4)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LEN,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
