"""The embedded demo model: the checkpoint is small, loads, answers about held-out documents; its text comes from a seed alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfmoon.engine.demo_model.document import Document, write_document
from halfmoon.engine.demo_model.llama import Llama, Shape, rms_norm
from halfmoon.engine.demo_model.measure import answer, exact_answers, examples, generated_answers
from halfmoon.engine.demo_model.rows import Batches, Encoder
from halfmoon.engine.demo_model.text import ABSENT, NOT_TOLD, Asker, Conversation, Kind, Turn, conversation
from halfmoon.engine.demo_model.tokenizer import SPECIALS
from halfmoon.engine.demo_model.train import write_checkpoint
from halfmoon.engine.demo_model.words import COMMON_NAMES, Split, Words, is_held_out

FOLDER = Path(__file__).parents[2] / "engine" / "demo_model"
NAMED_VALUES = ("person", "town", "name")
TITLES = {"Dr.", "Mr.", "Mrs.", "Captain"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(Tokenizer.from_file(str(FOLDER / "tokenizer.json")))


@pytest.fixture(scope="module")
def hf_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def hf_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_the_checkpoint_is_at_most_twelve_megabytes() -> None:
    files = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert sum((FOLDER / name).stat().st_size for name in files) <= 12_000_000


def test_the_configuration_says_a_small_llama_of_4096_positions_whose_turns_end() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 4096
    assert config["tie_word_embeddings"] is True
    assert generation["eos_token_id"] == config["eos_token_id"] == SPECIALS.index("<|end|>")


@pytest.mark.parametrize("length", [50, 200, 500])
def test_it_answers_about_held_out_documents_in_several_turns(length: int) -> None:
    tally = generated_answers(FOLDER, lengths=(length,), count=3, seed=101, plan=("asked", "pronoun", "asked"))
    right, asked = tally.counts[length, "all"]
    assert asked == 9
    assert right >= 8


def test_it_recalls_from_two_thousand_tokens(encoder: Encoder, hf_model: Any) -> None:
    @torch.no_grad()
    def predict(ids: torch.Tensor) -> torch.Tensor:
        return hf_model(ids).logits.argmax(-1)

    tally = exact_answers(predict, encoder, count=2, seed=102, rows=2, lengths=(2000,))
    right, asked = tally.counts[2000, "all"]
    assert asked == 20
    assert right >= 18


@pytest.mark.parametrize("said", ["Hello", "Who are you?", "What can you do?", "Thank you."])
def test_small_talk_is_a_sentence_that_ends(said: str, hf_model: Any, hf_tokenizer: Any) -> None:
    reply = answer(hf_model, hf_tokenizer, [{"role": "user", "content": said}])
    assert reply.endswith((".<|end|>", "?<|end|>"))
    assert 3 < len(reply) < 120


def test_a_question_without_a_fact_is_refused(hf_model: Any, hf_tokenizer: Any) -> None:
    asked = "The courier Mira carries key 4821. Mira lives in Kelford.\n\nWhich key does Tovin carry?"
    assert answer(hf_model, hf_tokenizer, [{"role": "user", "content": asked}]) == ABSENT + "<|end|>"


def test_the_chat_template_gives_the_ids_of_training(encoder: Encoder, hf_tokenizer: Any) -> None:
    talk = Conversation([Turn("system", "Be brief."), Turn("user", "Key 4821?\n\nÄ"), Turn("assistant", "Yes.", "talk")])
    messages = [{"role": turn.role, "content": turn.text} for turn in talk.turns]
    rendered = hf_tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "<|begin|><|system|>Be brief.<|end|><|user|>Key 4821?\n\nÄ<|end|><|assistant|>Yes.<|end|>"
    assert hf_tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"] == encoder.conversation(talk)[0]
    asked = hf_tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("<|end|><|assistant|>")


def test_the_chat_template_refuses_an_unknown_role(hf_tokenizer: Any) -> None:
    with pytest.raises(Exception, match="system, user or assistant, not tool"):
        hf_tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_every_digit_is_a_token_and_any_text_comes_back(hf_tokenizer: Any) -> None:
    text = "key 90210, ünïcode 漢字 \t and\r\n\n lines"
    ids = hf_tokenizer(text).input_ids
    assert {"9", "0", "2", "1"} <= set(hf_tokenizer.convert_ids_to_tokens(ids))
    assert hf_tokenizer.decode(ids) == "<|begin|>" + text


def test_the_same_seed_makes_the_same_text_and_another_seed_other_text() -> None:
    made = [[conversation(Random(seed), Words("train"), 900) for seed in seeds] for seeds in (range(20), range(20), range(20, 40))]
    assert made[0] == made[1]
    assert not set(map(str, made[0])) & set(map(str, made[2]))


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    file = str(FOLDER / "tokenizer.json")
    one, two = (Batches(file, seed=3, steps=9000, batch_tokens=2048) for _ in range(2))
    one[0]  # what was asked before does not matter
    assert all(torch.equal(left, right) for left, right in zip(one[7], two[7], strict=True))
    assert not torch.equal(one[7][0], one[8][0])


def _invented_names(document: Document) -> set[str]:
    named = [fact.value for fact in document.facts if fact.relation.value in NAMED_VALUES]
    named += [name.split()[-1] if kind in ("ship", "project") else name
              for kind, name in ((subject.kind, subject.name) for subject in document.by_subject)
              if kind in ("person", "town", "ship", "project")]  # fmt: skip
    return {part for name in named for part in name.split()} - TITLES


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_no_held_out_name_is_in_training_text_and_no_other_in_the_measure(split: Split) -> None:
    words = Words(split)
    names = {name for seed in range(60) for name in _invented_names(write_document(Random(seed), words, 3000))}
    invented = names - set(COMMON_NAMES)
    assert len(invented) > 500
    assert {is_held_out(name) for name in invented} == {split == "held_out"}
    assert split == "train" or invented == names


@pytest.mark.parametrize("kind", ["asked", "pronoun", "also", "reverse", "brief"])
def test_an_answer_is_what_the_document_says(kind: Kind) -> None:
    for seed in range(60):
        rng, words = Random(seed), Words("held_out")
        document = write_document(rng, words, 1500)
        asker = Asker(rng, words, document)
        asker.ask("asked")
        made = asker.ask(kind)
        known_by_role = re.fullmatch(r"Who is the (\w+)\?", made.question)
        if made.kind == "reverse" and known_by_role:
            role = known_by_role[1]
            assert f"he {role} {made.answer.removeprefix(f'The {role} is ')[:-1]}" in document.text
            continue
        said = [fact for fact in document.facts if fact.value in made.answer and fact.value in document.text]
        assert any(made.kind == "brief" or fact.subject.kind == "me" or fact.subject.name.lower() in made.answer.lower() for fact in said)


def test_an_absent_fact_is_in_no_document(encoder: Encoder) -> None:
    asked = 0
    for example in examples(encoder, 200, 40, 7, plan=("absent", "absent")):
        for made in (made for made in example.exchanges if made.kind == "absent"):
            asked += 1
            assert made.answer in (ABSENT, NOT_TOLD)
            assert made.question not in {other.question for other in example.exchanges if other.kind != "absent"}
    assert asked > 40


def test_the_plain_model_is_transformers_llama(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = Shape(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    model = Llama(shape, torch.float32)
    model.load_tensors({name: tensor.bfloat16() for name, tensor in model.tensors().items()})
    write_checkpoint(tmp_path, shape, model.tensors(), Tokenizer.from_file(str(FOLDER / "tokenizer.json")))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, shape.vocab_size, (2, 65))
    normed = rms_norm(model.hidden(ids), model.weights["model/norm/weight"], shape.rms_norm_eps, torch.float32)
    logits = (normed @ model.weights["model/embed_tokens/weight"].T).view(2, 65, -1)
    torch.testing.assert_close(logits, reference(ids).logits, atol=1e-4, rtol=1e-4)
