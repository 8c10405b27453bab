"""The embedded demo model: a small Llama checkpoint in Hugging Face format, and the code that made it.

words ─► relations, open_relations ─► document ─► text ──► rows ─► train ─► config.json, model.safetensors
                                        talk ─────┘ ├────► tokenizer ─────► tokenizer.json, chat template
                                                    └────► measure ───────► the accuracy table of README.md

The folder itself is the checkpoint: load it by its path. README.md is the model card.
"""
