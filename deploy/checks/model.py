"""Checks of the model folder, before anything reads a weight: config.json, every file of the weights, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

from ...engine.checkpoint import list_tensors, refuse_pointer
from ...engine.memory_need import weight_bytes
from ...engine.model_config import ModelConfig
from ...engine.model_flops import num_parameters
from ...engine.resolve import resolve_device, resolve_dtype, resolve_quantization
from ...protocol.config import ModelOptions
from ...protocol.memory import human_bytes
from ...proxy.model_card import ModelCard
from ...proxy.text.answer_form import AnswerForms
from ...proxy.text.tokenizer import Tokenizer
from .finding import Finding, ok


def check_weights(folder: Path, model: ModelConfig, options: ModelOptions) -> Finding:
    """Raises CheckpointError for a file that is missing, cut, or a git-LFS pointer."""
    quantization = resolve_quantization(model, options)
    numbers = resolve_dtype(model, options) if quantization is None else f"{quantization.told()} and {resolve_dtype(model, options)}"
    size = f"{num_parameters(model) / 1e9:.2f} B parameters, {human_bytes(weight_bytes(folder, model, options))} in {numbers}"
    if options.load_format == "dummy":
        return ok("weights", f"random ones of {folder.name}'s shape: {size}")
    files = {info.file for info in list_tensors(folder).values()}
    return ok("weights", f"{folder.name} in {len(files)} files: {size} on {resolve_device(options)}")


def check_tokenizer(folder: Path, model: ModelConfig) -> Finding:
    """Raises CheckpointError for no tokenizer, one that does not parse, or a chat template that does not."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        refuse_pointer(folder / name)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > model.vocab_size:
        return Finding(
            "tokenizer",
            "warning",
            f"the tokenizer of {folder} has {tokenizer.vocab_size} tokens and its model {model.vocab_size}: they are of two checkpoints",
            "take both from the same download",
        )
    if tokenizer.chat_template is None:
        return Finding(
            "tokenizer",
            "warning",
            f"{folder.name} has no chat template: /v1/chat/completions is refused, /v1/completions works",
            f"put the model's chat_template.jinja into {folder}",
        )
    return ok("tokenizer", f"{tokenizer.vocab_size} tokens, with a chat template")


def check_sampling(folder: Path, options: ModelOptions) -> Finding:
    """Raises CheckpointError for a recommendation of generation_config.json that is none."""
    told = ModelCard.from_folder(folder, options, "").told()
    return ok("sampling", f"by default {told}, as generation_config.json recommends" if told else "OpenAI's defaults")


def check_parsers(folder: Path, options: ModelOptions) -> Finding:
    """How chats' answers are read. Raises CheckpointError as check_tokenizer."""
    told = AnswerForms.chosen(Tokenizer.from_folder(folder), options).told()
    return ok("parsers", told or "chats' answers are plain text, and tools are refused; see model.tool_parser, model.reasoning_parser")
