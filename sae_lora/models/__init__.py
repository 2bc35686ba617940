"""Language models through transformers, and adapters through peft. Independent of SAEs and training."""
