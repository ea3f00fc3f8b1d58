"""Prefill: attention of many queries at once. `flash_attention` runs the newest version that can run here."""
