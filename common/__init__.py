"""What the kernels share: arguments, masks, merging, launches, hardware, references. Imports nothing else of ours."""
