"""Language models through transformers and peft; knows nothing of SAEs and of training."""
