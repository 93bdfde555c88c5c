"""Adapters (PEFT): loaded, trained, merged, over quantized weights."""
