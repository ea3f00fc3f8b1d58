"""What turns a version into an honest number: cases, providers, the gate, the clock, records, charts and tables."""
