"""A LoRA adapter with random weights, since the weights that PEFT starts from change nothing."""

import peft
import torch


def with_lora(model):
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(model, config).eval()
