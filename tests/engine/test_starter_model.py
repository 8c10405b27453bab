from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import transformers

from halfmoon.engine import starter_model
from halfmoon.engine.model_config import ModelConfig
from halfmoon.engine.sequence import StepChunk
from halfmoon.engine.starter_model import NAME, default_model_folder, make_starter_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_starter_model(tmp_path_factory.mktemp("starter") / "model")


def digest(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_it_is_the_same_bytes_every_time_and_small(folder, tmp_path):
    assert digest(make_starter_model(tmp_path / "again")) == digest(folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 16 * 2**20


def test_transformers_reads_it_and_gives_our_logits(folder, lab):
    import torch

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer("The cache holds what was computed before.")["input_ids"]
    ours = lab(folder, block_size=64)
    logits = ours.engine.forward([StepChunk(ours.sequence(prompt), 0, len(prompt))])
    with torch.no_grad():
        theirs = model(torch.tensor([prompt])).logits[0, -1:]
    assert (logits - theirs).norm() / theirs.norm() < 1e-4
    assert theirs.std() > 1.0


def test_the_tokenizer_returns_any_text_and_fits_the_vocabulary(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = ModelConfig.from_folder(folder)
    assert len(tokenizer) == config.vocab_size
    for text in ("def f(x): return x", "Tabs\tand\n\nlines  ", "日本語 naïve 🌗", "\x00\x7f"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == config.bos_token_id and max(ids) < config.vocab_size
        assert tokenizer.decode(ids[1:]) == text
    assert len(tokenizer("Return a list of the arguments that were given to the function.")["input_ids"]) < 16


def test_a_chat_ends_its_turns_with_the_end_of_sequence_token(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Bye"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin_of_text|><|user|>\nHi<|end_of_turn|>\n<|assistant|>\nYes?<|end_of_turn|>\n<|user|>\nBye<|end_of_turn|>\n<|assistant|>\n"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ModelConfig.from_folder(folder).eos_token_ids == {tokenizer.convert_tokens_to_ids("<|end_of_turn|>")}
    assert ids.count(tokenizer.eos_token_id) == 3


def test_the_cache_folder_is_made_once_and_found_again(tmp_path):
    made = default_model_folder(tmp_path)
    assert made.name == NAME and tmp_path in made.parents
    (made / "marker").write_text("here before")
    assert (default_model_folder(tmp_path) / "marker").exists()
    assert [path.name for path in made.parent.iterdir()] == [NAME]


def test_another_release_with_another_model_does_not_find_the_old_one(tmp_path, monkeypatch):
    old = default_model_folder(tmp_path)
    changed = tmp_path / "tokenizer"
    shutil.copytree(starter_model.TOKENIZER_FOLDER, changed)
    (changed / "tokenizer_config.json").write_text("{}")
    monkeypatch.setattr(starter_model, "TOKENIZER_FOLDER", changed)
    new = default_model_folder(tmp_path)
    assert new != old and (new / "tokenizer_config.json").read_text() == "{}"


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("halfmoon.engine.starter_model._write_tensors", fail)
    with pytest.raises(OSError, match="no space"):
        make_starter_model(tmp_path / NAME)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "letters.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match=r"holds no config\.json"):
        make_starter_model(tmp_path / NAME)
    assert [path.name for path in (tmp_path / NAME).iterdir()] == ["letters.txt"]


def test_two_processes_that_make_it_at_once_both_get_it_whole(tmp_path, folder):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(default_model_folder, [tmp_path, tmp_path])
    assert found[0] == found[1] and digest(found[0]) == digest(folder)
    assert [path.name for path in found[0].parent.iterdir()] == [NAME]


def test_whoever_looks_meanwhile_sees_the_whole_folder_or_none(tmp_path, folder):
    wanted = {path.name: path.stat().st_size for path in folder.iterdir()}
    looks = 0
    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(make_starter_model, tmp_path / NAME)
        while not (tmp_path / NAME).exists():
            looks += 1
        assert {path.name: path.stat().st_size for path in (tmp_path / NAME).iterdir()} == wanted
        making.result()
    assert looks > 0


def test_it_is_written_without_torch(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom halfmoon.engine.starter_model import make_starter_model\n"
        f"make_starter_model(Path({str(tmp_path / 'model')!r}))\nassert not {{'torch', 'ray', 'safetensors'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_hidden_layers"] == 4
