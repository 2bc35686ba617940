"""The suite `lora`: changes of the model's matrices by adapters."""
