"""Halfmoon: prefill/decode disaggregated LLM serving."""
