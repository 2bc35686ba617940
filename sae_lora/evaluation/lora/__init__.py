"""The suite `lora`: what adapters have done to the model's matrices."""
