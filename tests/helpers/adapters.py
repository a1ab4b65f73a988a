"""A LoRA adapter that is at work: PEFT's own beginning would change nothing."""

import peft
import torch


def with_lora(model):
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(model, config).eval()
