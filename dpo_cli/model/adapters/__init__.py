"""Adapters (PEFT): read, trained, merged, over quantized weights."""
